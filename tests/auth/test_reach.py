"""What auth decides is in force at the gateway when auth has answered: at the next request, not minutes later."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from shared.apikeys import Peppers
from tests.auth.front import Front, front
from tests.auth.harness import PASSWORD, PEPPERS, User
from tests.conftest import Components
from tests.gateway.outages import eventually

NEW_PASSWORD = "another horse, another battery"
Act = Callable[[Front, User], Awaitable[Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def whole(owner_url: str, components: Components) -> AsyncIterator[Front]:
    async with front(owner_url, components.redis_url) as started:
        yield started


async def ok(whole: Front, method: str, path: str, **request: Any) -> dict[str, Any]:
    answer = await whole.call(method, path, **request)
    assert answer.status_code < 300, answer.text
    return answer.json() if answer.content else {}


async def log_out(whole: Front, user: User) -> None:
    await ok(whole, "POST", "/api/v1/auth/logout", credential=user.access_token)


async def end_session(whole: Front, user: User) -> None:
    [session] = (await ok(whole, "GET", "/api/v1/auth/sessions", credential=user.access_token))["data"]
    await ok(whole, "DELETE", f"/api/v1/auth/sessions/{session['id']}", credential=user.access_token)


async def steal_refresh_token(whole: Front, user: User) -> None:
    body = {"refresh_token": user.refresh_token}
    await ok(whole, "POST", "/api/v1/auth/refresh", json=body)
    assert (await whole.call("POST", "/api/v1/auth/refresh", json=body)).status_code == 401


async def disable(whole: Front, user: User) -> None:
    operator = await whole.user("admin")
    path = f"/api/v1/admin/auth/users/{user.id}/status"
    await ok(whole, "POST", path, credential=operator.access_token, json={"status": "disabled"})


async def change_password_elsewhere(whole: Front, user: User) -> None:
    tokens = await ok(whole, "POST", "/api/v1/auth/login", json={"username": user.username, "password": PASSWORD})
    body = {"old_password": PASSWORD, "new_password": NEW_PASSWORD}
    await ok(whole, "POST", "/api/v1/auth/password", credential=tokens["access_token"], json=body)
    assert await whole.reaches_models(tokens["access_token"]) == 200


@pytest.mark.parametrize("act", [log_out, end_session, steal_refresh_token, disable, change_password_elsewhere])
async def test_an_access_token_ends_with_its_session_everywhere(whole: Front, act: Act) -> None:
    user = await whole.user("operator")
    assert await whole.reaches_models(user.access_token) == 200
    await act(whole, user)
    assert await whole.reaches_models(user.access_token) == 401


async def test_a_changed_role_ends_tokens_that_name_the_old_one_and_refresh_brings_the_new(whole: Front) -> None:
    user = await whole.user()
    services = whole.auth.services
    assert await whole.reaches_models(user.access_token) == 200
    await services.bootstrap.run(
        username=user.username, email=user.email, password="", role="operator", key_name="k", scopes=["chat"]
    )
    assert await whole.reaches_models(user.access_token) == 401
    tokens = await ok(whole, "POST", "/api/v1/auth/refresh", json={"refresh_token": user.refresh_token})
    assert await whole.reaches_models(tokens["access_token"]) == 200
    audit = await whole.call("GET", "/api/v1/admin/auth/audit", credential=tokens["access_token"])
    assert audit.status_code == 200


async def test_a_changed_membership_ends_tokens_and_keys_there(whole: Front) -> None:
    """Of the organisation that the token names; a second owner takes the first one's place."""
    user, other = await whole.user(), await whole.user()
    invitations = f"/api/v1/organizations/{user.org_id}/invitations"
    token = (await ok(whole, "POST", invitations, credential=user.access_token, json={"role": "owner"}))["token"]
    await ok(whole, "POST", "/api/v1/organizations/join", credential=other.access_token, json={"token": token})
    key = await whole.key(user, scopes=["models"])
    assert await whole.reaches_models(key["key"]) == 200
    member = f"/api/v1/organizations/{user.org_id}/members/{user.id}"
    await ok(whole, "PATCH", member, credential=other.access_token, json={"role": "member"})
    assert await whole.reaches_models(user.access_token) == 401
    assert await whole.reaches_models(key["key"]) == 200
    await ok(whole, "DELETE", member, credential=other.access_token)
    assert await whole.reaches_models(key["key"]) == 401
    assert await whole.reaches_models(other.access_token) == 200


async def test_a_rotated_key_works_through_its_grace_on_the_same_limits_and_never_past_its_own_expiry(
    whole: Front,
) -> None:
    user = await whole.user()
    old = await whole.key(user, limits={"minute": 3})
    path = f"/api/v1/keys/{old['id']}/rotate"
    new = await ok(whole, "POST", path, credential=user.access_token, json={"grace_s": 600})
    assert [await whole.reaches_models(key["key"]) for key in (old, new, old, new, old)] == [200] * 3 + [429] * 2
    expires_at = (whole.auth.clock.now() + timedelta(hours=1)).isoformat()
    short = await whole.key(user, expires_at=expires_at)
    path = f"/api/v1/keys/{short['id']}"
    await ok(whole, "POST", f"{path}/rotate", credential=user.access_token, json={"grace_s": 86_400})
    kept = (await ok(whole, "GET", path, credential=user.access_token))["expires_at"]
    assert datetime.fromisoformat(kept) == datetime.fromisoformat(expires_at)
    brief = await whole.key(user)
    path = f"/api/v1/keys/{brief['id']}/rotate"
    successor = await ok(whole, "POST", path, credential=user.access_token, json={"grace_s": 1})

    async def is_over() -> bool:
        return await whole.reaches_models(brief["key"]) == 401

    assert await whole.reaches_models(successor["key"]) == 200
    await eventually(is_over)
    assert await whole.reaches_models(successor["key"]) in {200, 429}  # the waiting drew on the limits of both
    row = await whole.auth.key_row(new["key"])
    assert row is not None
    assert str(row["limit_id"]) == old["id"]
    assert Peppers(PEPPERS).digest(new["key"]).hex == row["digest"]


async def test_every_change_of_a_key_is_in_force_at_its_next_request(whole: Front) -> None:
    user = await whole.user()
    key = await whole.key(user, scopes=["models"])
    path = f"/api/v1/keys/{key['id']}"
    assert await whole.reaches_models(key["key"]) == 200
    await ok(whole, "PATCH", path, credential=user.access_token, json={"scopes": ["chat"]})
    assert await whole.reaches_models(key["key"]) == 403
    await ok(whole, "PATCH", path, credential=user.access_token, json={"scopes": ["models"], "limits": {"minute": 2}})
    assert [await whole.reaches_models(key["key"]) for _ in range(2)] == [200, 429]
    await ok(whole, "DELETE", path, credential=user.access_token)
    assert await whole.reaches_models(key["key"]) == 401


async def test_a_session_goes_on_in_another_organisation_and_its_tokens_for_the_first_are_over(whole: Front) -> None:
    owner, member = await whole.user(), await whole.user()
    invitations = f"/api/v1/organizations/{owner.org_id}/invitations"
    token = (await ok(whole, "POST", invitations, credential=owner.access_token, json={}))["token"]
    await ok(whole, "POST", "/api/v1/organizations/join", credential=member.access_token, json={"token": token})
    assert await whole.reaches_models(member.access_token) == 200

    async def switch(refresh_token: str, org_id: str) -> Any:
        body = {"refresh_token": refresh_token, "organization_id": org_id}
        return await ok(whole, "POST", "/api/v1/auth/refresh", json=body)

    team = await switch(member.refresh_token, owner.org_id)
    assert await whole.reaches_models(member.access_token) == 401
    assert await whole.reaches_models(team["access_token"]) == 200
    # Billing sees the organisation, and that a plain member does not write to its money.
    await ok(whole, "GET", "/api/v1/billing/wallet", credential=team["access_token"])
    seen = whole.others.last.identity
    assert (seen.user_id, seen.org_id) == (member.id, owner.org_id)
    assert "billing:read" in seen.scopes
    assert "billing:write" not in seen.scopes
    again = await ok(whole, "POST", "/api/v1/auth/refresh", json={"refresh_token": team["refresh_token"]})
    await ok(whole, "GET", "/api/v1/billing/wallet", credential=again["access_token"])
    assert whole.others.last.identity.org_id == owner.org_id
    stranger = await whole.user()
    body = {"refresh_token": again["refresh_token"], "organization_id": stranger.org_id}
    refused = await whole.call("POST", "/api/v1/auth/refresh", json=body)
    assert (refused.status_code, refused.json()["code"]) == (404, "organization_not_found")
    home = await switch(again["refresh_token"], member.org_id)  # which the refusal did not use up
    assert await whole.reaches_models(again["access_token"]) == 401
    assert await whole.reaches_models(team["access_token"]) == 401
    assert await whole.reaches_models(home["access_token"]) == 200
    assert await whole.reaches_models(member.access_token) == 401
