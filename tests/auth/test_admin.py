"""What operators may do, and nobody else."""

import json

import pytest

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
