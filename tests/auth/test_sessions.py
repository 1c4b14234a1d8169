"""Refresh with rotation, theft, logout, the list of sessions."""

import asyncio

import pytest

from tests.auth.harness import ADDRESS, Auth, User, running
from tests.conftest import Components

REFRESH = "/api/v1/auth/refresh"
SESSIONS = "/api/v1/auth/sessions"


async def refresh(auth: Auth, token: str) -> tuple[int, dict[str, str]]:
    answer = await auth.call("POST", REFRESH, json={"refresh_token": token})
    return answer.status_code, answer.json()


async def me(auth: Auth, user: User) -> int:
    return (await auth.call("GET", "/api/v1/auth/me", token=user.access_token)).status_code


async def test_a_refresh_token_gives_a_new_pair_and_the_session_stays_one(auth: Auth) -> None:
    user = await auth.user()
    before = await auth.identity_of_token(user.access_token)
    status, tokens = await refresh(auth, user.refresh_token)
    assert status == 200
    assert tokens["refresh_token"] != user.refresh_token
    after = await auth.identity_of_token(tokens["access_token"])
    assert (after.session_id, after.user_id) == (before.session_id, user.id)
    assert (await refresh(auth, tokens["refresh_token"]))[0] == 200


async def test_a_refresh_token_that_comes_twice_ends_the_whole_session(auth: Auth) -> None:
    user = await auth.user()
    _, tokens = await refresh(auth, user.refresh_token)
    status, problem = await refresh(auth, user.refresh_token)
    assert (status, problem["code"]) == (401, "invalid_refresh_token")
    assert (await refresh(auth, tokens["refresh_token"]))[0] == 401
    assert await me(auth, user) == 401
    async with auth.connect() as connection:
        audited = await connection.fetchval(
            "SELECT count(*) FROM auth.audit_log WHERE action = 'session.refresh_token_reused' AND actor_user_id = $1",
            user.id,
        )
    assert audited == 1


async def test_of_two_refreshes_at_once_one_wins_and_the_session_ends(auth: Auth) -> None:
    user = await auth.user()
    answers = await asyncio.gather(*(refresh(auth, user.refresh_token) for _ in range(6)))
    assert sorted(status for status, _ in answers) == [200] + [401] * 5
    winner = next(tokens for status, tokens in answers if status == 200)
    assert (await refresh(auth, winner["refresh_token"]))[0] == 401


async def test_unknown_and_malformed_refresh_tokens_are_refused(auth: Auth) -> None:
    status, problem = await refresh(auth, "tg_refresh_" + "A" * 43)
    assert (status, problem["code"]) == (401, "invalid_refresh_token")
    for bad in ("", "x" * 257, "tg refresh", "a\x00b"):
        assert (await refresh(auth, bad))[0] == 400


async def test_only_a_digest_of_the_refresh_token_is_stored(auth: Auth) -> None:
    user = await auth.user()
    async with auth.connect() as connection:
        rows = await connection.fetch("SELECT t::text FROM auth.refresh_token t")
    assert not any(user.refresh_token in row[0] for row in rows)


async def test_logout_ends_the_session_by_access_token_or_by_refresh_token(auth: Auth) -> None:
    by_access, by_refresh = await auth.user(), await auth.user()
    for _ in range(2):  # again is fine
        answer = await auth.call("POST", "/api/v1/auth/logout", token=by_access.access_token)
        assert answer.status_code == 204
        body = {"refresh_token": by_refresh.refresh_token}
        assert (await auth.call("POST", "/api/v1/auth/logout", json=body)).status_code == 204
    for user in (by_access, by_refresh):
        assert (await refresh(auth, user.refresh_token))[0] == 401
        assert await me(auth, user) == 401
    nobody = await auth.call("POST", "/api/v1/auth/logout")
    assert (nobody.status_code, nobody.json()["code"]) == (401, "no_session")


async def test_sessions_are_listed_with_their_place_and_revoked_one_by_one(auth: Auth) -> None:
    user = await auth.user()
    agent = {"user-agent": "Elsewhere/1.0 \u00e9" + "x" * 500}
    body = {"username": user.username, "password": "correct horse battery staple"}
    await auth.call("POST", "/api/v1/auth/login", json=body, headers={k: v.encode("latin-1") for k, v in agent.items()})
    listed = (await auth.call("GET", SESSIONS, token=user.access_token)).json()
    assert (listed["object"], listed["has_more"], len(listed["data"])) == ("list", False, 2)
    other, current = listed["data"]
    assert (current["current"], other["current"], other["address"]) == (True, False, ADDRESS)
    assert other["user_agent"].startswith("Elsewhere/1.0")
    assert len(other["user_agent"]) == 256

    for _ in range(2):
        gone = await auth.call("DELETE", f"{SESSIONS}/{other['id']}", token=user.access_token)
        assert gone.status_code == 204
    assert [s["id"] for s in (await auth.call("GET", SESSIONS, token=user.access_token)).json()["data"]] == [
        current["id"]
    ]


async def test_anothers_session_is_not_there(auth: Auth) -> None:
    user, other = await auth.user(), await auth.user()
    session_id = (await auth.identity_of_token(other.access_token)).session_id
    answer = await auth.call("DELETE", f"{SESSIONS}/{session_id}", token=user.access_token)
    assert (answer.status_code, answer.json()["code"]) == (404, "session_not_found")
    assert await me(auth, other) == 200


async def test_an_api_key_cannot_see_or_end_sessions(auth: Auth) -> None:
    user = await auth.user()
    key = (await auth.key(user, scopes=["keys:write", "keys:read"]))["key"]
    session_id = (await auth.identity_of_token(user.access_token)).session_id
    assert (await auth.call("GET", SESSIONS, key=key)).status_code == 403
    assert (await auth.call("DELETE", f"{SESSIONS}/{session_id}", key=key)).status_code == 403


async def test_refresh_tokens_and_sessions_end_by_the_clock(owner_url: str, components: Components) -> None:
    changes = {"auth_refresh_token_ttl_s": 100, "auth_session_ttl_s": 250}
    async with running(owner_url, components.redis_url, **changes) as auth:
        idle, busy = await auth.user(), await auth.user()
        auth.clock.advance(99)
        status, tokens = await refresh(auth, busy.refresh_token)
        assert status == 200
        auth.clock.advance(1)
        assert (await refresh(auth, idle.refresh_token))[0] == 401
        auth.clock.advance(80)
        status, tokens = await refresh(auth, tokens["refresh_token"])
        assert (status, int(tokens["refresh_expires_in"])) == (200, 70)  # the session's end comes first
        auth.clock.advance(70)
        assert (await refresh(auth, tokens["refresh_token"]))[0] == 401


async def test_sessions_that_are_over_are_deleted_and_live_ones_stay(owner_url: str, components: Components) -> None:
    changes = {"auth_session_ttl_s": 60, "auth_prune_batch_max": 2}
    async with running(owner_url, components.redis_url, **changes) as auth:
        old = [await auth.user() for _ in range(3)]
        auth.clock.advance(61)
        fresh = await auth.user()
        while await auth.services.sessions.prune():
            pass
        async with auth.connect() as connection:
            owners = {str(r[0]) for r in await connection.fetch("SELECT user_id FROM auth.session")}
        assert fresh.id in owners
        assert not owners & {user.id for user in old}


async def test_too_many_sessions_push_out_the_oldest(owner_url: str, components: Components) -> None:
    async with running(owner_url, components.redis_url, auth_sessions_per_user_max=2) as auth:
        user = await auth.user()
        auth.clock.advance(1)
        second = (await auth.login(user.username)).json()
        auth.clock.advance(1)
        await auth.login(user.username)
        assert (await refresh(auth, user.refresh_token))[0] == 401
        assert (await refresh(auth, second["refresh_token"]))[0] == 200


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
async def test_unknown_addresses_and_methods_answer_with_problems(auth: Auth, method: str) -> None:
    answer = await auth.call(method, "/api/v1/auth/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
