"""Signing keys rotate, by age or by command, and nobody is logged out."""

import asyncio
from typing import Any

import pytest
import pytest_asyncio
from jose import jwt
from jose.exceptions import JWTError

from tests.auth.harness import Auth, User, migrate, running
from tests.conftest import Components, FreshDatabase

LEAD_S, TOKEN_S, SKEW_S, DAY_S = 60, 900, 60, 86_400


@pytest_asyncio.fixture(loop_scope="session")
async def pair(fresh_database: FreshDatabase, components: Components) -> Any:
    """Two replicas over one database, and one clock."""
    url = await asyncio.to_thread(fresh_database, "auth", migrate)
    async with running(url, components.redis_url) as first, running(url, components.redis_url) as second:
        yield first, second


async def jwks(auth: Auth) -> dict[str, Any]:
    found: dict[str, Any] = (await auth.http.get("/.well-known/jwks.json")).json()
    return found


async def kids(auth: Auth) -> list[str]:
    return [key["kid"] for key in (await jwks(auth))["keys"]]


async def refreshed(auth: Auth, user: User) -> str:
    answer = await auth.call("POST", "/api/v1/auth/refresh", json={"refresh_token": user.refresh_token})
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


def kid_of(token: str) -> str:
    kid: str = jwt.get_unverified_header(token)["kid"]
    return kid


async def tick(replicas: tuple[Auth, Auth], seconds: float) -> None:
    for replica in replicas:
        replica.clock.advance(seconds)
    for replica in replicas:
        await replica.services.signing_keys.refresh()


async def test_a_new_key_is_published_before_it_signs_and_the_old_one_until_its_last_token_is_over(
    pair: tuple[Auth, Auth],
) -> None:
    first, second = pair
    user = await first.user()
    [old] = await kids(first)
    new = await first.services.signing_keys.rotate()
    assert await kids(first) == [new, old]
    assert await kids(second) == [old]
    await second.services.signing_keys.refresh()
    assert await kids(second) == [new, old]
    assert kid_of((await second.user()).access_token) == old

    await tick(pair, LEAD_S)
    latest = await refreshed(second, user)
    assert kid_of(latest) == new
    for replica in pair:
        assert replica.claims(user.access_token, await jwks(replica))["sub"] == user.id
        assert replica.claims(latest, await jwks(replica))["sub"] == user.id
    await tick(pair, TOKEN_S)
    assert await kids(first) == [new, old]
    await tick(pair, SKEW_S)
    assert await kids(first) == await kids(second) == [new]


async def test_a_copied_key_is_replaced_at_once_and_people_refresh(pair: tuple[Auth, Auth]) -> None:
    first, second = pair
    user = await first.user()
    new = await second.services.signing_keys.rotate(at_once=True)
    await tick(pair, 1)  # the replicas' clocks differ
    assert await kids(first) == [new]
    with pytest.raises(JWTError):
        first.claims(user.access_token, await jwks(first))
    latest = await refreshed(first, user)
    assert kid_of(latest) == new
    assert (await first.call("GET", "/api/v1/auth/me", token=latest)).status_code == 200


async def test_an_old_key_is_replaced_once_whatever_the_number_of_replicas(pair: tuple[Auth, Auth]) -> None:
    first, second = pair
    [old] = await kids(first)
    await tick(pair, 90 * DAY_S - 1)
    assert await kids(first) == [old]
    for replica in pair:
        replica.clock.advance(2)
    await asyncio.gather(*(replica.services.signing_keys.refresh() for replica in (*pair, *pair)))
    assert await kids(first) == await kids(second)
    assert len(await kids(first)) == 2
    async with first.connect() as connection:
        audited = await connection.fetchval("SELECT count(*) FROM auth.audit_log WHERE action = 'signing_key.rotated'")
    assert audited == 1
