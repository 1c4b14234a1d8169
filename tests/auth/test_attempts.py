"""Back-off after failed sign-ins."""

import asyncio
import json
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.auth.repository.sign_in import SignInDatabase
from services.auth.service.passwords import Passwords
from tests.auth.harness import PASSWORD, Auth, User, running
from tests.conftest import Components

LOGIN = "/api/v1/auth/login"
HOME, OFFICE = "198.51.100.4", "198.51.100.5"


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _no_attempts(auth: Auth) -> None:
    """Tests share addresses, not what was counted for them."""
    async with auth.connect() as connection:
        await connection.execute("DELETE FROM auth.sign_in_attempt")


async def sign_in(auth: Auth, name: str, address: str, password: str = PASSWORD) -> httpx.Response:
    headers = {"x-forwarded-for": address}
    return await auth.call("POST", LOGIN, json={"username": name, "password": password}, headers=headers)


async def fail(auth: Auth, name: str, address: str) -> int:
    return (await sign_in(auth, name, address, "a wrong password")).status_code


async def test_after_five_failures_waits_double_and_an_unknown_name_gets_the_same_answers(auth: Auth) -> None:
    user = await auth.user()

    async def answers(name: str, address: str) -> list[tuple[int, str, str | None]]:
        seen = []
        for wait_s in (0, 0, 0, 0, 0, 1, 2, 4):
            if wait_s:
                for password in ("a wrong password", PASSWORD):  # not even looked at
                    blocked = await sign_in(auth, name, address, password)
                    seen.append((blocked.status_code, blocked.json()["code"], blocked.headers.get("retry-after")))
                auth.clock.advance(wait_s)
            answer = await sign_in(auth, name, address, "a wrong password")
            seen.append((answer.status_code, answer.json()["code"], answer.headers.get("retry-after")))
        return seen

    known = await answers(user.username, HOME)
    assert known == await answers("nobody-of-that-name", OFFICE)
    assert [status for status, _, _ in known] == [401] * 5 + [429, 429, 401] * 3
    assert [wait for status, _, wait in known if status == 429] == ["1", "1", "2", "2", "4", "4"]
    auth.clock.advance(8)
    assert (await sign_in(auth, user.username, HOME)).status_code == 200
    assert [await fail(auth, user.username, HOME) for _ in range(5)] == [401] * 5  # it starts anew


async def test_a_wait_is_never_longer_than_the_longest_and_failures_are_forgotten(
    owner_url: str, components: Components
) -> None:
    changes = {"auth_sign_in_backoff_max_s": 3, "auth_sign_in_memory_s": 60}
    async with running(owner_url, components.redis_url, **changes) as auth:
        name = (await auth.user()).username
        assert [await fail(auth, name, HOME) for _ in range(6)] == [401] * 5 + [429]
        for _ in range(4):
            auth.clock.advance(3)
            assert [await fail(auth, name, HOME) for _ in range(2)] == [401, 429]
        assert (await sign_in(auth, name, HOME)).headers["retry-after"] == "3"
        auth.clock.advance(60)
        assert [await fail(auth, name, HOME) for _ in range(6)] == [401] * 5 + [429]
        auth.clock.advance(64)
        while await auth.services.attempts.prune():
            pass
        async with auth.connect() as connection:
            assert await connection.fetchval("SELECT count(*) FROM auth.sign_in_attempt") == 0


async def test_nobody_elses_failures_lock_a_person_out(auth: Auth) -> None:
    """Under attack from many addresses a new one gets one try; that one counts."""
    user = await auth.user()
    for n in range(21):
        assert await fail(auth, user.username, f"192.0.2.{n}") == 401
    assert [await fail(auth, user.username, "192.0.2.200") for _ in range(2)] == [401, 429]
    assert (await sign_in(auth, user.username, HOME)).status_code == 200
    assert [await fail(auth, user.username, HOME) for _ in range(2)] == [401, 429]
    auth.clock.advance(1)
    assert (await sign_in(auth, user.username, HOME)).status_code == 200


async def test_one_password_tried_on_many_names_blocks_the_address_for_every_name(
    owner_url: str, components: Components
) -> None:
    async with running(owner_url, components.redis_url, auth_sign_in_address_free=10) as auth:
        user = await auth.user()
        assert [await fail(auth, f"somebody-{n}", HOME) for n in range(11)] == [401] * 10 + [429]
        assert (await sign_in(auth, user.username, HOME)).status_code == 429
        assert (await sign_in(auth, user.username, OFFICE)).status_code == 200
        auth.clock.advance(1)
        assert (await sign_in(auth, user.username, HOME)).status_code == 200
        # An account of the attacker's own takes nothing off the count but itself.
        assert [await fail(auth, f"somebody-{n}", HOME) for n in range(20, 22)] == [401, 429]


@pytest.mark.parametrize(
    ("first", "second"),
    [("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"), ("192.0.2.77", "::ffff:192.0.2.77")],
)
async def test_the_addresses_of_one_line_count_as_one(auth: Auth, first: str, second: str) -> None:
    name = (await auth.user()).username
    assert [await fail(auth, name.upper(), first) for _ in range(5)] == [401] * 5
    assert await fail(auth, name, second) == 429


async def test_whoever_goes_on_while_blocked_costs_the_database_nothing(
    auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a connection; and the wait is not longer for that."""
    monkeypatch.setattr("services.auth.service.attempts.KNOWN_BLOCK_S", 3_600)
    name = (await auth.user()).username
    assert [await fail(auth, name, HOME) for _ in range(6)] == [401] * 5 + [429]
    taken: list[SignInDatabase] = []
    connection = SignInDatabase.connection

    def counted(self: SignInDatabase) -> Any:
        taken.append(self)
        return connection(self)

    monkeypatch.setattr(SignInDatabase, "connection", counted)
    assert [await fail(auth, name, HOME) for _ in range(3)] == [429] * 3
    assert not taken
    assert await fail(auth, name, OFFICE) == 401
    auth.clock.advance(1)
    assert (await sign_in(auth, name, HOME)).status_code == 200


async def test_of_many_at_once_no_more_are_tried_than_one_after_the_other(
    auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    matches = Passwords._matches

    def counted(self: Passwords, stored: str, password: str) -> bool:
        tried.append(password)
        return matches(self, stored, password)

    name = (await auth.user()).username
    monkeypatch.setattr(Passwords, "_matches", counted)
    statuses = await asyncio.gather(*(fail(auth, name, HOME) for _ in range(40)))
    assert len(tried) == statuses.count(401) == 5
    assert statuses.count(429) == 35


async def test_a_block_is_audited_where_it_begins_and_the_table_tells_no_names(auth: Auth) -> None:
    user = await auth.user()
    for _ in range(8):
        await fail(auth, user.username, HOME)
    async with auth.connect("tollgate_auth") as connection:
        rows = await connection.fetch(
            "SELECT details FROM auth.audit_log WHERE target_id = $1 AND action = 'sign_in.failed' ORDER BY id", user.id
        )
        table = str(await connection.fetch("SELECT a::text FROM auth.sign_in_attempt a"))
    details = [json.loads(row[0]) for row in rows]
    assert details == [{"reason": "wrong_password"}] * 4 + [{"reason": "wrong_password", "blocked_s": 1.0}]
    assert user.username not in table
    assert HOME not in table


async def test_sign_ins_that_found_no_thread_and_right_ones_leave_nothing_behind(
    owner_url: str, components: Components
) -> None:
    async with running(owner_url, components.redis_url, auth_argon2_threads=1, auth_argon2_queue_max=0) as auth:
        user = await auth.user()
        async with auth.connect() as connection:
            await connection.execute("DELETE FROM auth.sign_in_attempt")
        statuses = [a.status_code for a in await asyncio.gather(*(auth.login(user.username) for _ in range(5)))]
        assert set(statuses) <= {200, 503}
        assert 200 in statuses
        assert (await auth.login(user.username)).status_code == 200
        async with auth.connect() as connection:
            assert await connection.fetchval("SELECT count(*) FROM auth.sign_in_attempt") == 0


async def change(auth: Auth, user: User, old: str, new: str, **request: Any) -> httpx.Response:
    body = {"old_password": old, "new_password": new}
    caller = request or {"token": user.access_token}
    return await auth.call("POST", "/api/v1/auth/password", json=body, **caller)


async def test_a_changed_password_ends_the_other_sessions_and_not_this_one_nor_keys(auth: Auth) -> None:
    user = await auth.user()
    key = await auth.key(user)
    elsewhere = (await auth.login(user.username)).json()
    answer = await change(auth, user, PASSWORD, "another good password")
    assert answer.status_code == 204, answer.text
    assert (await auth.call("GET", "/api/v1/auth/me", token=user.access_token)).status_code == 200
    assert (await auth.call("GET", "/api/v1/auth/me", key=key["key"])).status_code == 200
    assert (await auth.call("GET", "/api/v1/auth/me", token=elsewhere["access_token"])).status_code == 401
    body = {"refresh_token": elsewhere["refresh_token"]}
    assert (await auth.call("POST", "/api/v1/auth/refresh", json=body)).status_code == 401
    assert (await auth.login(user.username)).status_code == 401
    assert (await auth.login(user.username, "another good password")).status_code == 200
    async with auth.connect() as connection:
        actions = await connection.fetch("SELECT action FROM auth.audit_log WHERE target_id = $1 ORDER BY id", user.id)
    assert "user.password_changed" in [row[0] for row in actions]


async def test_a_password_is_changed_only_by_the_person_with_the_old_one_to_an_acceptable_one(auth: Auth) -> None:
    user = await auth.user()
    for old, new, status, code, param in (
        ("wrong", "another good password", 403, "wrong_password", "old_password"),
        (PASSWORD, "short", 400, "password_length", "new_password"),
        (PASSWORD, "password123", 400, "weak_password", "new_password"),
        (PASSWORD, user.email, 400, "weak_password", "new_password"),
    ):
        answer = await change(auth, user, old, new)
        assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (status, code, param)
    key = await auth.key(user, scopes=["keys:write"])
    assert (await change(auth, user, PASSWORD, "another good password", key=key["key"])).status_code == 403
    assert (await auth.login(user.username)).status_code == 200


async def test_the_old_password_cannot_be_guessed_with_a_stolen_token_nor_sign_ins_blocked_by_it(auth: Auth) -> None:
    user = await auth.user()
    statuses = [(await change(auth, user, "wrong", "another good password")).status_code for _ in range(7)]
    assert statuses == [403] * 5 + [429] * 2
    assert (await auth.login(user.username)).status_code == 200


async def test_of_two_changes_at_once_one_wins_and_a_sign_in_meanwhile_brings_no_old_password_back(auth: Auth) -> None:
    user = await auth.user()
    news = ["first new password", "second new password"]
    answers = await asyncio.gather(*(change(auth, user, PASSWORD, new) for new in news), auth.login(user.username))
    assert sorted(a.status_code for a in answers[:2]) == [204, 403]
    won = news[[a.status_code for a in answers[:2]].index(204)]
    assert (await auth.login(user.username, won)).status_code == 200
    assert (await auth.login(user.username)).status_code == 401
    async with auth.connect() as connection:
        live = await connection.fetchval(
            "SELECT count(*) FROM auth.session WHERE user_id = $1 AND revoked_at IS NULL", user.id
        )
    assert live == 2  # the one that changed it, and the sign-in with the new password
