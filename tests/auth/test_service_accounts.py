"""Service accounts: keys that belong to no person, and stay when people leave."""

from typing import Any

from tests.auth.harness import Auth, User


async def make(auth: Auth, user: User, name: str = "nightly batch") -> dict[str, Any]:
    answer = await auth.call(
        "POST",
        f"/api/v1/organizations/{user.org_id}/service-accounts",
        token=user.access_token,
        json={"name": name},
    )
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def join(auth: Auth, owner: User, user: User, role: str) -> None:
    path = f"/api/v1/organizations/{owner.org_id}/invitations"
    token = (await auth.call("POST", path, token=owner.access_token, json={"role": role})).json()["token"]
    joined = await auth.call("POST", "/api/v1/organizations/join", token=user.access_token, json={"token": token})
    assert joined.status_code == 200, joined.text


async def test_its_keys_outlive_who_made_them_and_end_with_it(auth: Auth) -> None:
    owner, admin = await auth.user(), await auth.user()
    await join(auth, owner, admin, "admin")
    account = await make(auth, owner)
    made = await auth.call(
        "POST",
        f"/api/v1/keys?organization_id={owner.org_id}",
        token=admin.access_token,
        json={"name": "batch", "service_account_id": account["id"]},
    )
    assert made.status_code == 201, made.text
    key = made.json()
    assert key["user_id"] == account["id"]
    members = f"/api/v1/organizations/{owner.org_id}/members"
    assert (await auth.call("DELETE", f"{members}/{admin.id}", token=admin.access_token)).status_code == 204
    row = await auth.key_row(key["key"])
    assert row is not None
    assert (row["status"], str(row["user_id"]), row["roles"]) == ("active", account["id"], ["user"])

    rotated = await auth.call("POST", f"/api/v1/keys/{key['id']}/rotate", token=owner.access_token)
    assert (rotated.status_code, rotated.json()["user_id"]) == (201, account["id"])
    path = f"/api/v1/organizations/{owner.org_id}/service-accounts/{account['id']}"
    assert (await auth.call("DELETE", path, token=owner.access_token)).status_code == 204
    for secret in (key["key"], rotated.json()["key"]):
        row = await auth.key_row(secret)
        assert row is not None
        assert row["status"] == "revoked"
    assert (await auth.call("DELETE", path, token=owner.access_token)).status_code == 404
    refused = await auth.call(
        "POST", "/api/v1/keys", token=owner.access_token, json={"name": "k", "service_account_id": account["id"]}
    )
    assert (refused.status_code, refused.json()["code"]) == (404, "service_account_not_found")


async def test_it_is_no_member_and_nobody_signs_in_as_one(auth: Auth) -> None:
    owner = await auth.user()
    account = await make(auth, owner)
    members = (await auth.call("GET", f"/api/v1/organizations/{owner.org_id}/members", token=owner.access_token)).json()
    assert [member["user_id"] for member in members["data"]] == [owner.id]
    path = f"/api/v1/organizations/{owner.org_id}/members/{account['id']}"
    promoted = await auth.call("PATCH", path, token=owner.access_token, json={"role": "owner"})
    assert (promoted.status_code, promoted.json()["code"]) == (404, "member_not_found")
    async with auth.connect() as connection:
        name = await connection.fetchval("SELECT username FROM auth.user_account WHERE id = $1", account["id"])
    for password in ("", "!", "whatever it is"):
        assert (await auth.login(name, password)).status_code == 401


async def test_members_see_service_accounts_and_only_owners_and_admins_keep_them(auth: Auth) -> None:
    owner, member, stranger = await auth.user(), await auth.user(), await auth.user()
    await join(auth, owner, member, "member")
    account = await make(auth, owner)
    path = f"/api/v1/organizations/{owner.org_id}/service-accounts"
    seen = await auth.call("GET", path, token=member.access_token)
    assert [(a["id"], a["name"]) for a in seen.json()["data"]] == [(account["id"], "nightly batch")]
    assert (await auth.call("POST", path, token=member.access_token, json={"name": "x"})).status_code == 403
    assert (await auth.call("DELETE", f"{path}/{account['id']}", token=member.access_token)).status_code == 403
    key = await auth.call(
        "POST",
        f"/api/v1/keys?organization_id={owner.org_id}",
        token=member.access_token,
        json={"name": "k", "service_account_id": account["id"]},
    )
    assert (key.status_code, key.json()["code"]) == (403, "not_allowed_in_organization")
    for method, where in (("GET", path), ("POST", path), ("DELETE", f"{path}/{account['id']}")):
        assert (await auth.call(method, where, token=stranger.access_token, json={"name": "x"})).status_code == 404
    other = await auth.call(
        "POST",
        "/api/v1/keys",
        token=stranger.access_token,
        json={"name": "k", "service_account_id": account["id"]},
    )
    assert other.status_code == 404
