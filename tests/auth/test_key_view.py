"""What the gateway reads of a key, and what nobody may do to the database."""

import json
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from shared.apikeys import Peppers
from tests.auth.harness import PEPPERS, Auth, User


async def row(auth: Auth, key: dict[str, Any]) -> dict[str, Any]:
    found = await auth.key_row(key["key"])
    assert found is not None
    return dict(found)


async def set_status(auth: Auth, by: User, user: User, status: str) -> None:
    path = f"/api/v1/admin/auth/users/{user.id}/status"
    answer = await auth.call("POST", path, token=by.access_token, json={"status": status})
    assert answer.status_code == 200


async def test_the_view_has_the_contracts_columns_with_effective_limits(auth: Auth) -> None:
    user = await auth.user("operator")
    expires_at = auth.clock.now() + timedelta(days=1)
    key = await auth.key(
        user, scopes=["chat"], models=["chat-mini"], limits={"minute": 5}, expires_at=expires_at.isoformat()
    )
    found = await row(auth, key)
    found["limits"] = json.loads(found["limits"])
    digest = Peppers(PEPPERS).digest(key["key"])
    assert {k: str(v) if k.endswith("_id") else v for k, v in found.items()} == {
        "digest": digest.hex,
        "pepper": digest.pepper,
        "key_id": key["id"],
        "limit_id": key["id"],
        "org_id": user.org_id,
        "user_id": user.id,
        "plan": "default",
        "roles": ["operator", "user"],
        "scopes": ["chat"],
        "models": ["chat-mini"],
        "limits": {"minute": 5, "hour": 1000, "day": 10000, "concurrency": 16, "tokens_per_minute": 100000},
        "version": 1,
        "status": "active",
        "expires_at": expires_at,
        "allowed_addresses": None,
    }


async def test_all_models_is_null_and_no_model_is_an_empty_list(auth: Auth) -> None:
    user = await auth.user()
    assert (await row(auth, await auth.key(user)))["models"] is None
    assert (await row(auth, await auth.key(user, models=[])))["models"] == []


async def test_allowed_addresses_are_networks_in_their_normal_form(auth: Auth) -> None:
    user = await auth.user()
    key = await auth.key(user, allowed_addresses=["192.0.2.77/24", "2001:db8::1", "192.0.2.0/24"])
    assert (await row(auth, key))["allowed_addresses"] == ["192.0.2.0/24", "2001:db8::1/128"]
    path = f"/api/v1/keys/{key['id']}"
    for given, expected in ((["10.0.0.0/8"], ["10.0.0.0/8"]), (None, None)):
        changed = await auth.call("PATCH", path, token=user.access_token, json={"allowed_addresses": given})
        assert changed.json()["allowed_addresses"] == expected
        assert (await row(auth, key))["allowed_addresses"] == expected
    assert (await row(auth, key))["version"] == 3
    for bad in ([], ["nowhere"], ["10.0.0.0/33"], ["x" * 65], "10.0.0.0/8", ["::/0"] * 51):
        refused = await auth.call("PATCH", path, token=user.access_token, json={"allowed_addresses": bad})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request"), bad


async def test_a_rotated_key_keeps_its_terms(auth: Auth) -> None:
    user = await auth.user()
    terms = {"scopes": ["models"], "models": ["chat-mini"], "limits": {"minute": 7}, "allowed_addresses": ["::1/128"]}
    old = await auth.key(user, **terms)
    rotated = await auth.call("POST", f"/api/v1/keys/{old['id']}/rotate", token=user.access_token)
    before, after = await row(auth, old), await row(auth, rotated.json())
    same = {"limit_id", "org_id", "user_id", "plan", "roles", "scopes", "models", "limits", "allowed_addresses"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert before["expires_at"] == auth.clock.now() + timedelta(days=1)
    assert after["expires_at"] is None


async def test_every_change_that_matters_grows_the_version(auth: Auth) -> None:
    user, operator = await auth.user(), await auth.user("operator")
    key = await auth.key(user)
    path = f"/api/v1/keys/{key['id']}"
    versions = [(await row(auth, key))["version"]]
    await auth.call("PATCH", path, token=user.access_token, json={"limits": {"minute": 5}})
    versions.append((await row(auth, key))["version"])
    await auth.call(
        "POST",
        f"/api/v1/admin/auth/keys/{key['id']}/limits",
        token=operator.access_token,
        json={"limits": {"minute": 500}},
    )
    versions.append((await row(auth, key))["version"])
    await set_status(auth, operator, user, "disabled")
    assert (await row(auth, key))["status"] == "revoked"
    versions.append((await row(auth, key))["version"])
    await set_status(auth, operator, user, "active")
    assert (await row(auth, key))["status"] == "active"
    versions.append((await row(auth, key))["version"])
    token = (await auth.login(user.username)).json()["access_token"]
    await auth.call("DELETE", path, token=token)
    assert (await row(auth, key))["status"] == "revoked"
    versions.append((await row(auth, key))["version"])
    assert versions == [1, 2, 3, 4, 5, 6]


async def test_a_key_of_a_suspended_organisation_or_of_somebody_who_left_it_is_revoked(auth: Auth) -> None:
    suspended, left = await auth.user(), await auth.user()
    keys = [await auth.key(user) for user in (suspended, left)]
    async with auth.connect() as connection:
        await connection.execute("UPDATE auth.organization SET status = 'suspended' WHERE id = $1", suspended.org_id)
        await connection.execute("DELETE FROM auth.membership WHERE user_id = $1", left.id)
    assert [(await row(auth, key))["status"] for key in keys] == ["revoked", "revoked"]
    for user in (suspended, left):
        assert (await auth.call("GET", "/api/v1/auth/me", token=user.access_token)).status_code == 401


async def test_the_gateways_role_reads_the_two_views_and_nothing_else(auth: Auth) -> None:
    async with auth.connect("tollgate_gateway") as connection:
        await connection.fetch("SELECT * FROM auth.key_view")
        await connection.fetch("SELECT * FROM auth.session_view")
        relations = await connection.fetch(
            """SELECT relname, relkind FROM pg_class
               WHERE relnamespace = 'auth'::regnamespace AND relkind IN ('r', 'v', 'S')
                 AND relname NOT IN ('key_view', 'session_view')"""
        )
        assert len(relations) >= 15
        for relation in relations:
            name = relation["relname"]
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT * FROM auth.{name}")
        for statement in (
            "INSERT INTO auth.key_view (status) VALUES ('active')",
            "UPDATE auth.key_view SET status = 'active'",
            "DELETE FROM auth.key_view",
            "CREATE TABLE auth.mine (x int)",
            "CREATE TABLE public.mine (x int)",
        ):
            with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.ObjectNotInPrerequisiteStateError)):
                await connection.execute(statement)


@pytest.mark.parametrize("statement", ["UPDATE auth.audit_log SET action = 'x'", "DELETE FROM auth.audit_log"])
async def test_the_audit_log_cannot_be_changed_by_the_service_nor_by_the_owner(auth: Auth, statement: str) -> None:
    await auth.user()
    async with auth.connect("tollgate_auth") as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    async with auth.connect() as connection:
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await connection.execute(statement)
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await connection.execute("TRUNCATE auth.audit_log")


async def test_the_services_role_cannot_change_tables_plans_or_roles_nor_delete_people(auth: Auth) -> None:
    async with auth.connect("tollgate_auth") as connection:
        for statement in (
            "DELETE FROM auth.user_account",
            "DELETE FROM auth.api_key",
            "UPDATE auth.plan SET limits = '{}'",
            "INSERT INTO auth.role_permission VALUES ('user', '*')",
            "ALTER TABLE auth.audit_log DISABLE TRIGGER ALL",
            "CREATE TABLE auth.mine (x int)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


async def test_a_key_does_no_more_than_its_owner_may_now(auth: Auth) -> None:
    """Roles of the installation and of the organisation bound a key's scopes at use, and give them back."""
    boss, member = await auth.user(), await auth.user()
    path = f"/api/v1/organizations/{boss.org_id}"
    invitation = await auth.call("POST", f"{path}/invitations", token=boss.access_token, json={"role": "admin"})
    body = {"token": invitation.json()["token"]}
    assert (await auth.call("POST", "/api/v1/organizations/join", token=member.access_token, json=body)).is_success
    wanted = ["models", "billing:write", "chat"]
    made = await auth.call(
        "POST",
        f"/api/v1/keys?organization_id={boss.org_id}",
        token=member.access_token,
        json={"name": "k", "scopes": wanted},
    )
    key = made.json()
    assert (await row(auth, key))["scopes"] == wanted
    for role, expected in (("member", ["models", "chat"]), ("owner", wanted)):
        answer = await auth.call("PATCH", f"{path}/members/{member.id}", token=boss.access_token, json={"role": role})
        assert answer.status_code == 200, answer.text
        assert (await row(auth, key))["scopes"] == expected
    async with auth.connect() as connection:
        await connection.execute("INSERT INTO auth.role VALUES ('reader', 'Reads') ON CONFLICT DO NOTHING")
        await connection.execute("INSERT INTO auth.role_permission VALUES ('reader', 'models') ON CONFLICT DO NOTHING")
        await connection.execute("UPDATE auth.user_role SET role = 'reader' WHERE user_id = $1", member.id)
    assert (await row(auth, key))["scopes"] == ["models"]


async def test_a_key_for_everything_of_somebody_who_is_no_admin_any_more_is_for_what_they_may(auth: Auth) -> None:
    admin = await auth.user("admin")
    key = await auth.key(admin, scopes=["admin", "*"])
    assert (await row(auth, key))["scopes"] == ["admin", "*"]
    account = await auth.services.installation.user(admin.username)
    version = (await row(auth, key))["version"]
    await auth.services.installation.set_role(account, "admin", held=False)
    found = await row(auth, key)
    assert set(found["scopes"]) == {
        "chat", "models", "inference", "billing:read", "billing:write", "keys:read", "keys:write"
    }  # fmt: skip
    assert found["version"] == version + 1


async def test_a_service_accounts_key_keeps_what_a_manager_gave_it(auth: Auth) -> None:
    owner = await auth.user()
    path = f"/api/v1/organizations/{owner.org_id}/service-accounts"
    account = (await auth.call("POST", path, token=owner.access_token, json={"name": "batch"})).json()
    key = await auth.key(owner, service_account_id=account["id"], scopes=["billing:write"])
    assert (await row(auth, key))["scopes"] == ["billing:write"]
