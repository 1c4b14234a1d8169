"""Organisations: members, roles, invitations, and the keys that follow them."""

import asyncio
from typing import Any

import httpx
import pytest

from shared import apikeys
from shared.apikeys import Peppers
from tests.auth.harness import PEPPERS, Auth, User, running
from tests.conftest import Components

ORGS = "/api/v1/organizations"


async def call(auth: Auth, user: User, method: str, path: str, body: Any = None) -> httpx.Response:
    return await auth.call(method, f"{ORGS}{path}", token=user.access_token, json=body)


async def organization(auth: Auth, owner: User) -> str:
    answer = await call(auth, owner, "POST", "", {"name": "Analytical Engines"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def add(auth: Auth, org_id: str, by: User, user: User, role: str = "member") -> None:
    invited = await call(auth, by, "POST", f"/{org_id}/invitations", {"role": role})
    assert invited.status_code == 201, invited.text
    joined = await call(auth, user, "POST", "/join", {"token": invited.json()["token"]})
    assert (joined.status_code, joined.json()["role"]) == (200, role), joined.text


async def key_in(auth: Auth, org_id: str, user: User) -> dict[str, Any]:
    path = f"/api/v1/keys?organization_id={org_id}"
    answer = await auth.call("POST", path, token=user.access_token, json={"name": "team", "scopes": ["keys:read"]})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_who_makes_an_organisation_owns_it_and_lists_it_after_their_own(auth: Auth) -> None:
    user = await auth.user()
    org_id = await organization(auth, user)
    listed = (await call(auth, user, "GET", "")).json()["data"]
    assert [(o["id"], o["role"], o["personal"]) for o in listed] == [
        (user.org_id, "owner", True),
        (org_id, "owner", False),
    ]
    renamed = await call(auth, user, "PATCH", f"/{org_id}", {"name": "  Difference Engines "})
    assert renamed.json()["name"] == "Difference Engines"
    assert (await call(auth, user, "GET", f"/{org_id}")).json() == renamed.json()
    assert (await auth.call("GET", "/api/v1/auth/me", token=user.access_token)).json()["org_id"] == user.org_id
    for body in ({}, {"name": ""}, {"name": "x" * 101}, {"name": "x", "plan": "gold"}):
        assert (await call(auth, user, "POST", "", body)).status_code == 400


async def test_without_self_service_only_operators_make_organisations(auth: Auth, components: Components) -> None:
    async with running(auth.owner_url, components.redis_url, auth_self_service_orgs=False) as strict:
        user, operator = await strict.user(), await strict.user("operator")
        refused = await call(strict, user, "POST", "", {"name": "Free credits"})
        assert (refused.status_code, refused.json()["code"]) == (403, "organizations_by_operators")
        await organization(strict, operator)


async def test_an_invitation_works_once_until_it_expires_or_is_withdrawn(auth: Auth) -> None:
    owner, first, second = await auth.user(), await auth.user(), await auth.user()
    org_id = await organization(auth, owner)

    async def invite(**body: Any) -> dict[str, Any]:
        made: dict[str, Any] = (await call(auth, owner, "POST", f"/{org_id}/invitations", body)).json()
        return made

    used, old, withdrawn = await invite(), await invite(expires_in=60), await invite()
    listed = (await call(auth, owner, "GET", f"/{org_id}/invitations")).json()["data"]
    assert [i["id"] for i in listed] == [withdrawn["id"], old["id"], used["id"]]
    assert "token" not in str(listed)
    async with auth.connect() as connection:
        assert used["token"] not in str(await connection.fetch("SELECT i::text FROM auth.invitation i"))
    assert (await call(auth, owner, "DELETE", f"/{org_id}/invitations/{withdrawn['id']}")).status_code == 204
    assert (await call(auth, owner, "DELETE", f"/{org_id}/invitations/{withdrawn['id']}")).status_code == 404
    answers = await asyncio.gather(*(call(auth, u, "POST", "/join", {"token": used["token"]}) for u in (first, second)))
    assert sorted(a.status_code for a in answers) == [200, 400]
    auth.clock.advance(60)
    for token in (old["token"], withdrawn["token"], used["token"], "tg_invite_unknown"):
        refused = await call(auth, second, "POST", "/join", {"token": token})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_invitation")
    assert len((await call(auth, owner, "GET", f"/{org_id}/members")).json()["data"]) == 2


async def test_what_each_role_may_do(auth: Auth) -> None:
    owner, admin, member, other = [await auth.user() for _ in range(4)]
    org_id = await organization(auth, owner)
    await add(auth, org_id, owner, admin, "admin")
    await add(auth, org_id, admin, member)
    await add(auth, org_id, admin, other)
    members = (await call(auth, member, "GET", f"/{org_id}/members")).json()["data"]
    assert [(m["username"], m["role"]) for m in members] == [
        (owner.username, "owner"),
        (admin.username, "admin"),
        *((u.username, "member") for u in sorted((member, other), key=lambda u: u.id)),
    ]
    refused: list[tuple[User, str, str, Any]] = [
        (member, "PATCH", "", {"name": "x"}),
        (member, "POST", "/invitations", {"role": "member"}),
        (member, "GET", "/invitations", None),
        (member, "PATCH", f"/members/{member.id}", {"role": "owner"}),
        (member, "DELETE", f"/members/{other.id}", None),
        (admin, "POST", "/invitations", {"role": "owner"}),
        (admin, "PATCH", f"/members/{admin.id}", {"role": "owner"}),
        (admin, "PATCH", f"/members/{owner.id}", {"role": "member"}),
        (admin, "DELETE", f"/members/{owner.id}", None),
    ]
    for user, method, path, body in refused:
        answer = await call(auth, user, method, f"/{org_id}{path}", body)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_allowed_in_organization"), (method, path)
    for method, path, body in (
        ("PATCH", f"/members/{owner.id}", {"role": "admin"}),
        ("DELETE", f"/members/{owner.id}", None),
    ):
        answer = await call(auth, owner, method, f"/{org_id}{path}", body)
        assert (answer.status_code, answer.json()["code"]) == (409, "last_owner")
    assert (await call(auth, owner, "PATCH", f"/{org_id}/members/{admin.id}", {"role": "owner"})).status_code == 200
    assert (await call(auth, owner, "DELETE", f"/{org_id}/members/{owner.id}")).status_code == 204
    assert (await call(auth, owner, "GET", f"/{org_id}")).status_code == 404


async def test_of_two_owners_that_leave_at_once_one_stays(auth: Auth) -> None:
    owners = await auth.user(), await auth.user()
    org_id = await organization(auth, owners[0])
    await add(auth, org_id, owners[0], owners[1], "owner")
    answers = await asyncio.gather(*(call(auth, o, "DELETE", f"/{org_id}/members/{o.id}") for o in owners))
    assert sorted(a.status_code for a in answers) == [204, 409]


async def test_a_plain_members_key_does_not_write_to_the_organisations_money(auth: Auth) -> None:
    owner, admin, member = [await auth.user() for _ in range(3)]
    org_id = await organization(auth, owner)
    await add(auth, org_id, owner, admin, "admin")
    await add(auth, org_id, owner, member)

    async def make(user: User, scope: str, where: str) -> int:
        body = {"name": "money", "scopes": [scope]}
        return (await auth.call("POST", f"/api/v1/keys{where}", token=user.access_token, json=body)).status_code

    team = f"?organization_id={org_id}"
    assert [await make(user, "billing:write", team) for user in (owner, admin, member)] == [201, 201, 403]
    assert [await make(member, "billing:read", team), await make(member, "billing:write", "")] == [201, 201]


async def test_members_see_their_own_keys_and_owners_everybodys_and_nobody_another_organisations(auth: Auth) -> None:
    owner, member, stranger = [await auth.user() for _ in range(3)]
    org_id = await organization(auth, owner)
    await add(auth, org_id, owner, member)
    theirs, owners = await key_in(auth, org_id, member), await key_in(auth, org_id, owner)
    at_home = await auth.key(owner)
    query = f"?organization_id={org_id}"

    async def listed(user: User, where: str = query) -> list[str]:
        page = (await auth.call("GET", f"/api/v1/keys{where}", token=user.access_token)).json()
        return [key["id"] for key in page["data"]]

    assert await listed(owner) == [owners["id"], theirs["id"]]
    assert await listed(member) == [theirs["id"]]
    assert (await listed(owner, ""), await listed(member, "")) == ([at_home["id"]], [])
    row = await auth.key_row(theirs["key"])
    assert row is not None
    assert (str(row["org_id"]), str(row["user_id"]), row["status"]) == (org_id, member.id, "active")

    async def status(user: User, method: str, key: dict[str, Any], path: str = "") -> int:
        answer = await auth.call(method, f"/api/v1/keys/{key['id']}{path}{query}", token=user.access_token)
        return answer.status_code

    assert [await status(member, "GET", owners), await status(member, "DELETE", owners)] == [404, 404]
    assert [await status(stranger, "GET", theirs), await status(stranger, "DELETE", theirs)] == [404, 404]
    assert await status(owner, "GET", at_home) == 404
    assert await status(owner, "POST", theirs, "/rotate") == 403
    by_key = await auth.call("GET", f"/api/v1/keys?organization_id={owner.org_id}", key=owners["key"])
    assert (by_key.status_code, by_key.json()["code"]) == (404, "organization_not_found")
    seen_by_key = (await auth.call("GET", "/api/v1/keys", key=theirs["key"])).json()["data"]
    assert [key["id"] for key in seen_by_key] == [theirs["id"]]
    assert await status(owner, "DELETE", theirs) == 204


@pytest.mark.parametrize("change", ["role", "removed", "left"])
async def test_a_change_of_membership_reaches_gateways_before_it_is_answered(auth: Auth, change: str) -> None:
    owner, member = await auth.user(), await auth.user()
    org_id = await organization(auth, owner)
    await add(auth, org_id, owner, member)
    key, at_home = await key_in(auth, org_id, member), await auth.key(member)
    digest = Peppers(PEPPERS).digest(key["key"]).hex
    record, version = apikeys.record_name(digest), apikeys.version_name(org_id, key["id"])
    await auth.redis.set(record, '{"v": 1}', ex=300)
    await auth.redis.set(version, "1", ex=300)
    path = f"/{org_id}/members/{member.id}"
    if change == "role":
        answer = await call(auth, owner, "PATCH", path, {"role": "admin"})
    else:
        answer = await call(auth, owner if change == "removed" else member, "DELETE", path)
    assert answer.status_code < 300, answer.text
    assert (await auth.redis.get(version), await auth.redis.get(record)) == ("2", None)
    rows = [await auth.key_row(k["key"]) for k in (key, at_home)]
    expected = "active" if change == "role" else "revoked"
    assert [row["status"] for row in rows if row] == [expected, "active"]
    if change != "role":  # who comes back does not find their old keys working
        await add(auth, org_id, owner, member)
        row = await auth.key_row(key["key"])
        assert row is not None
        assert row["status"] == "revoked"


async def test_organisations_are_for_people(auth: Auth) -> None:
    operator = await auth.user("operator")
    key = await auth.key(operator, scopes=["admin", "keys:write"])
    for method, path, body in (("GET", "", None), ("POST", "", {"name": "x"}), ("GET", f"/{operator.org_id}", None)):
        answer = await auth.call(method, f"{ORGS}{path}", key=key["key"], json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_a_person")


async def test_there_is_a_bound_on_everything(owner_url: str, components: Components) -> None:
    changes = {"auth_orgs_per_user_max": 2, "auth_members_per_org_max": 2, "auth_invitations_per_org_max": 2}
    async with running(owner_url, components.redis_url, **changes) as auth:
        owner, first, second = [await auth.user() for _ in range(3)]
        answers = await asyncio.gather(*(call(auth, owner, "POST", "", {"name": f"o-{n}"}) for n in range(4)))
        assert sorted(a.status_code for a in answers) == [201] + [409] * 3
        org_id = next(a.json()["id"] for a in answers if a.status_code == 201)
        invited = [await call(auth, owner, "POST", f"/{org_id}/invitations", {}) for _ in range(3)]
        assert [a.status_code for a in invited] == [201, 201, 409]
        joined = [
            await call(auth, user, "POST", "/join", {"token": answer.json()["token"]})
            for user, answer in zip((first, second), invited, strict=False)
        ]
        assert [(a.status_code, a.json().get("code")) for a in joined] == [(200, None), (409, "too_many_members")]
