"""What operators may do, and nobody else."""

import json
import secrets
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.auth.harness import Auth

ADMIN = "/api/v1/admin/auth"


async def test_an_operator_raises_a_keys_limits_and_the_owner_may_lower_but_not_raise_them(auth: Auth) -> None:
    user, operator = await auth.user(), await auth.user("operator")
    key = await auth.key(user)
    path = f"{ADMIN}/keys/{key['id']}/limits"
    raised = await auth.call(
        "POST", path, token=operator.access_token, json={"limits": {"minute": 600, "tokens_per_minute": 0}}
    )
    assert raised.status_code == 200
    assert raised.json()["limits"] == {**key["limits"], "minute": 600, "tokens_per_minute": 0}

    async def own(minute: int) -> int:
        body = {"limits": {"minute": minute}}
        return (await auth.call("PATCH", f"/api/v1/keys/{key['id']}", token=user.access_token, json=body)).status_code

    assert await own(601) == 403
    assert await own(100) == 200
    assert await own(101) == 403
    reset = await auth.call("POST", path, token=operator.access_token, json={"limits": None})
    assert reset.json()["limits"] == key["limits"]
    for bad in ({}, {"limits": {"minute": 100_001}}, {"limits": 5}):
        assert (await auth.call("POST", path, token=operator.access_token, json=bad)).status_code == 400


async def test_administrative_acts_are_audited_with_who_and_before_and_after(auth: Auth) -> None:
    user, operator = await auth.user(), await auth.user("operator")
    key = await auth.key(user, limits={"minute": 5})
    await auth.call(
        "POST", f"{ADMIN}/keys/{key['id']}/limits", token=operator.access_token, json={"limits": {"minute": 600}}
    )
    async with auth.connect("tollgate_auth") as connection:
        entry = await connection.fetchrow(
            "SELECT * FROM auth.audit_log WHERE action = 'key.limits_set' AND target_id = $1", key["id"]
        )
    assert str(entry["actor_user_id"]) == operator.id
    assert str(entry["org_id"]) == user.org_id
    assert entry["request_id"].startswith("req_")
    assert json.loads(entry["details"]) == {"before": {"minute": 5}, "after": {"minute": 600}}


@pytest.mark.parametrize("role", [None, "operator", "admin"])
async def test_administrative_addresses_need_the_role_now_not_when_the_token_was_made(
    auth: Auth, role: str | None
) -> None:
    user, other = await auth.user(role), await auth.user()
    key = await auth.key(other)
    path = f"{ADMIN}/keys/{key['id']}/revoke"
    expected = 200 if role else 403
    assert (await auth.call("POST", path, token=user.access_token)).status_code == expected
    if role:
        async with auth.connect() as connection:
            await connection.execute("DELETE FROM auth.user_role WHERE user_id = $1 AND role = $2", user.id, role)
        refused = await auth.call("POST", path, token=user.access_token)
        assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_role")


async def test_an_operators_key_acts_for_them_only_with_the_scope_admin(auth: Auth) -> None:
    operator, other = await auth.user("operator"), await auth.user()
    path = f"{ADMIN}/keys/{(await auth.key(other))['id']}/revoke"
    plain, admin = await auth.key(operator), await auth.key(operator, scopes=["admin"])
    refused = await auth.call("POST", path, key=plain["key"])
    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
    assert (await auth.call("POST", path, key=admin["key"])).status_code == 200


async def test_a_disabled_user_is_out_at_once_and_their_keys_work_again_when_enabled(auth: Auth) -> None:
    user, operator = await auth.user(), await auth.user("operator")
    key = await auth.key(user)
    path = f"{ADMIN}/users/{user.id}/status"

    async def set_status(status: str) -> None:
        for _ in range(2):
            answer = await auth.call("POST", path, token=operator.access_token, json={"status": status})
            assert answer.json() == {"user_id": user.id, "status": status}

    await set_status("disabled")
    assert (await auth.call("GET", "/api/v1/auth/me", token=user.access_token)).status_code == 401
    refresh = await auth.call("POST", "/api/v1/auth/refresh", json={"refresh_token": user.refresh_token})
    assert refresh.status_code == 401
    await set_status("active")
    assert (await auth.call("GET", "/api/v1/auth/me", token=user.access_token)).status_code == 401
    assert (await auth.call("GET", "/api/v1/auth/me", key=key["key"])).status_code == 200
    assert (await auth.login(user.username)).status_code == 200


async def test_only_an_admin_disables_operators_and_nobody_themselves(auth: Auth) -> None:
    operator, colleague, admin = await auth.user("operator"), await auth.user("operator"), await auth.user("admin")
    body = {"status": "disabled"}

    async def disable(by: str, whom: str) -> int:
        return (await auth.call("POST", f"{ADMIN}/users/{whom}/status", token=by, json=body)).status_code

    assert await disable(operator.access_token, colleague.id) == 403
    assert await disable(operator.access_token, admin.id) == 403
    assert await disable(admin.access_token, admin.id) == 403
    assert await disable(admin.access_token, colleague.id) == 200
    assert await disable(admin.access_token, "0190a000-0000-7000-8000-000000000000") == 404


USERS = "/api/v1/admin/auth/users"


async def test_operators_list_everybody_and_find_them_by_the_beginning_of_name_or_address(auth: Auth) -> None:
    operator = await auth.user("operator")
    stem = f"find-{secrets.token_hex(4)}"
    made = [(await auth.register(username=f"{stem}.{n}", email=f"{stem}-{n}@example.com")).json() for n in range(5)]
    await auth.register(username=f"{stem[:-1]}-other")

    async def pages(**query: str) -> list[list[str]]:
        seen, cursor = [], None
        while True:
            params = {**query, "limit": "2", **({"cursor": cursor} if cursor else {})}
            answer = await auth.call("GET", USERS, token=operator.access_token, params=params)
            assert answer.status_code == 200, answer.text
            page = answer.json()
            seen.append([user["name"] for user in page["data"]])
            cursor = page["next_cursor"]
            assert page["has_more"] is (cursor is not None)
            if cursor is None or len(seen) == 3:
                return seen

    names = [user["username"] for user in made]
    assert await pages(search=stem.upper()) == [names[:2], names[2:4], names[4:]]
    assert await pages(search=f"{stem}-1@ex") == [[names[1]]]
    assert await pages(search=f"{stem}%") == await pages(search="_" * 9) == [[]]
    listed = await pages()
    assert listed[0][1] == names[4]  # the newest but one
    found = (await auth.call("GET", USERS, token=operator.access_token, params={"search": names[0]})).json()["data"][0]
    assert found["id"] == made[0]["user_id"]
    assert (found["email"], found["status"], found["roles"]) == (f"{stem}-0@example.com", "active", ["user"])
    assert "password" not in str(found)


async def test_nobody_else_lists_users(auth: Auth) -> None:
    user = await auth.user()
    assert (await auth.call("GET", USERS, token=user.access_token)).status_code == 403
    assert (await auth.call("GET", USERS)).status_code == 401


async def test_lists_and_searches_read_an_index_and_no_more_than_their_page(auth: Auth) -> None:
    """As PostgreSQL would have it on a table that is worth an index."""
    operator = await auth.user("operator")
    statements: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        if "user_account" in statement and "LIMIT" in statement:
            statements.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        for params in ({}, {"search": "a"}, {"search": "a@b"}):
            answer = await auth.call("GET", USERS, token=operator.access_token, params=params)
            assert answer.status_code == 200
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    lists = [(text, values) for text, values in statements if "password_hash" in text and "membership" not in text]
    assert len(lists) == 3
    async with auth.connect("tollgate_auth") as connection:
        await connection.execute("SET enable_seqscan = off; SET enable_sort = off")
        for text, values in lists:
            plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {text}", *values))
            assert "Index Scan" in plan, plan
            assert "Seq Scan on user_account" not in plan, plan
            assert "Sort Key: user_account" not in plan, plan
            assert "Sort Key: (lower" not in plan, plan
