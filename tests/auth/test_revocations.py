"""Many keys revoked at once, and leaked keys."""

from typing import Any

import pytest

from shared import apikeys
from tests.auth.harness import ADDRESS, Auth, User, running
from tests.auth.test_organizations import add, key_in, organization
from tests.conftest import Components

ADMIN = "/api/v1/admin/auth"
LEAKED = "/api/v1/keys/leaked"


async def statuses(auth: Auth, *keys: dict[str, Any]) -> list[str]:
    rows = [await auth.key_row(key["key"]) for key in keys]
    return [row["status"] for row in rows if row is not None]


async def revoke(auth: Auth, user: User, org_id: str, body: Any = None) -> tuple[int, Any]:
    path = f"/api/v1/keys/revoke?organization_id={org_id}"
    answer = await auth.call("POST", path, token=user.access_token, json=body)
    return answer.status_code, answer.json().get("revoked", answer.json().get("code"))


async def test_an_organisations_keys_go_at_once_or_one_members_and_no_others(auth: Auth) -> None:
    owner, member, outsider = [await auth.user() for _ in range(3)]
    org_id = await organization(auth, owner)
    await add(auth, org_id, owner, member)
    keys = [await key_in(auth, org_id, owner), await key_in(auth, org_id, member), await auth.key(member)]
    assert await revoke(auth, member, org_id) == (403, "not_allowed_in_organization")
    assert await revoke(auth, member, org_id, {"user_id": owner.id}) == (403, "not_allowed_in_organization")
    assert await revoke(auth, outsider, org_id) == (404, "organization_not_found")
    assert await revoke(auth, owner, org_id, {"user_id": outsider.id}) == (404, "member_not_found")
    assert await statuses(auth, *keys) == ["active"] * 3
    assert await revoke(auth, member, org_id, {"user_id": member.id}) == (200, 1)
    assert await statuses(auth, *keys) == ["active", "revoked", "active"]
    assert await revoke(auth, owner, org_id) == (200, 1)
    assert await statuses(auth, *keys) == ["revoked", "revoked", "active"]
    assert await revoke(auth, owner, org_id) == (200, 0)


async def test_operators_revoke_a_users_or_an_organisations_keys_everywhere(auth: Auth) -> None:
    operator, owner, member = await auth.user("operator"), await auth.user(), await auth.user()
    org_id = await organization(auth, owner)
    await add(auth, org_id, owner, member)
    keys = [await auth.key(member), await key_in(auth, org_id, member), await key_in(auth, org_id, owner)]
    for path in (f"{ADMIN}/users/{member.id}/keys/revoke", f"{ADMIN}/organizations/{org_id}/keys/revoke"):
        assert (await auth.call("POST", path, token=owner.access_token)).status_code == 403
    answer = await auth.call("POST", f"{ADMIN}/users/{member.id}/keys/revoke", token=operator.access_token)
    assert answer.json() == {"revoked": 2}
    assert await statuses(auth, *keys) == ["revoked", "revoked", "active"]
    answer = await auth.call("POST", f"{ADMIN}/organizations/{org_id}/keys/revoke", token=operator.access_token)
    assert answer.json() == {"revoked": 1}
    for path in (f"{ADMIN}/users/{org_id}/keys/revoke", f"{ADMIN}/organizations/{member.id}/keys/revoke"):
        assert (await auth.call("POST", path, token=operator.access_token)).status_code == 404
    audited = await auth.call("GET", f"{ADMIN}/audit?action=keys.revoked", token=operator.access_token)
    last, before = audited.json()["data"][:2]
    assert (last["target_type"], last["details"]["keys"]) == ("organization", [keys[2]["id"]])
    assert (before["target_type"], sorted(before["details"]["keys"])) == ("user", sorted(k["id"] for k in keys[:2]))


async def test_more_keys_than_a_batch_all_reach_redis(owner_url: str, components: Components) -> None:
    async with running(owner_url, components.redis_url, auth_outbox_batch_max=2) as auth:
        user = await auth.user()
        keys = [await auth.key(user) for _ in range(5)]
        assert await revoke(auth, user, user.org_id) == (200, 5)
        versions = [await auth.redis.get(apikeys.version_name(user.org_id, key["id"])) for key in keys]
        assert versions == ["2"] * 5
        async with auth.connect() as connection:
            assert await connection.fetchval("SELECT count(*) FROM auth.key_outbox WHERE delivered_at IS NULL") == 0


async def test_a_leaked_key_is_revoked_by_whoever_sends_it_and_every_answer_is_the_same(auth: Auth) -> None:
    user = await auth.user()
    key, other = await auth.key(user), await auth.key(user)
    await auth.redis.set(apikeys.version_name(user.org_id, key["id"]), "1", ex=300)
    answers = []
    for secret in (key["key"], key["key"], apikeys.generate(), "tg_live_nonsense", "x"):
        answer = await auth.call("POST", LEAKED, json={"key": secret})
        answers.append((answer.status_code, answer.content))
    assert set(answers) == {(204, b"")}
    assert await statuses(auth, key, other) == ["revoked", "active"]
    assert await auth.redis.get(apikeys.version_name(user.org_id, key["id"])) == "2"
    async with auth.connect() as connection:
        lines = await connection.fetch("SELECT * FROM auth.audit_log WHERE action = 'key.leaked'")
    assert [(str(line["target_id"]), str(line["address"])) for line in lines] == [(key["id"], ADDRESS)]
    assert key["key"] not in str(lines)


@pytest.mark.parametrize("body", [{}, {"key": ""}, {"key": "x" * 257}, {"key": 7}, {"key": "tg\x00"}])
async def test_a_leak_report_without_a_key_is_refused(auth: Auth, body: dict[str, Any]) -> None:
    answer = await auth.call("POST", LEAKED, json=body)
    assert (answer.status_code, answer.json()["param"]) == (400, "key")
