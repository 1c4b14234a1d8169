"""Limits as clients meet them: headers on every response, 429 with the truth, nothing drawn by a refusal."""

import asyncio
import re
import time
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError
from redis.asyncio import Redis

from tests.conftest import Components
from tests.gateway.harness import Backend, Directory, Gateway, gateway, settings
from tests.gateway.outages import eventually
from tests.gateway.signing import Tokens


async def test_the_sixty_first_request_in_a_minute_is_refused_truthfully(
    gateway: Gateway, directory: Directory
) -> None:
    key = await directory.create_key(limits={"minute": 60, "hour": 1_000, "day": 10_000})
    began = time.monotonic()
    for left in range(59, -1, -1):
        response = await gateway.http.get("/v1/models", headers=key.headers)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
    refused = await gateway.http.get("/v1/models", headers=key.headers)
    elapsed = time.monotonic() - began
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "60 requests per minute" in refused.json()["error"]["message"]
    assert 60 - elapsed <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit-policy"] == '"minute";q=60;w=60,"hour";q=1000;w=3600,"day";q=10000;w=86400'
    assert re.fullmatch(r'"minute";r=0;t=\d+,"hour";r=940;t=\d+,"day";r=9940;t=\d+', refused.headers["ratelimit"]), (
        refused.headers["ratelimit"]
    )


async def test_retry_after_is_when_it_works_again(gateway: Gateway, directory: Directory, redis: Redis) -> None:
    key = await directory.create_key(limits={"minute": 1})
    assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 200
    name = await _state_name(redis, str(key.org_id))
    refused = await gateway.http.get("/v1/models", headers=key.headers)
    wait_s = int(refused.headers["retry-after"])
    assert refused.status_code == 429
    assert 0 < wait_s <= 60
    # The wait goes by: the recorded request, first in the ring after the header and the day's cells, ages by so much.
    at = 48 + 289 * 4
    stored = await redis.getrange(name, at, at + 6)
    assert isinstance(stored, bytes)
    recorded = int.from_bytes(stored, "big")
    assert abs(recorded / 1e6 - time.time()) < 60
    await redis.setrange(name, at, (recorded - wait_s * 1_000_000).to_bytes(7, "big"))

    async def works() -> bool:  # the gateway remembers its refusal for a second
        return (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 200

    await eventually(works)


async def _state_name(redis: Redis, org_id: str) -> bytes:
    names = [name async for name in redis.scan_iter(f"{{{org_id}}}:limit:*")]
    assert len(names) == 1
    return bytes(names[0])


async def test_everything_that_one_script_touches_shares_a_hash_tag(
    gateway: Gateway, directory: Directory, redis: Redis
) -> None:
    key = await directory.create_key(limits={"concurrency": 3})
    await gateway.http.get("/v1/models", headers=key.headers)
    names = {name async for name in redis.scan_iter(f"*{key.org_id}*")}
    assert names
    assert all(name.startswith(f"{{{key.org_id}}}:".encode()) for name in names)


async def test_a_scope_that_is_missing_draws_nothing(gateway: Gateway, directory: Directory) -> None:
    key = await directory.create_key(scopes=("models",))
    for _ in range(3):
        response = await gateway.http.post("/v1/chat/completions", json={}, headers=key.headers)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_scope")
    assert response.headers["x-ratelimit-remaining-requests"] == "60"


async def test_two_gateways_share_one_limit(
    gateway: Gateway, components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key(limits={"minute": 20, "concurrency": 1_000})
    async with _another(components, database_url, backend) as other:
        responses = await asyncio.gather(
            *(g.http.get("/v1/models", headers=key.headers) for g in (gateway, other) for _ in range(30))
        )
    assert sorted(r.status_code for r in responses) == [200] * 20 + [429] * 40


def _another(components: Components, database_url: str, backend: Backend) -> AbstractAsyncContextManager[Gateway]:
    return gateway(settings(components.redis_url, database_url, backend.url))


async def test_concurrency_is_bounded_and_given_back(gateway: Gateway, backend: Backend, directory: Directory) -> None:
    gate, entered = asyncio.Event(), []

    async def wait(_scope: Any, _receive: Any, send: Any) -> None:
        entered.append(1)
        await gate.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    backend.handlers["/v1/chat/completions"] = wait
    key = await directory.create_key(limits={"concurrency": 2})
    running = [asyncio.create_task(gateway.http.post("/v1/chat/completions", headers=key.headers)) for _ in range(2)]

    await eventually(lambda: len(entered) == 2)
    refused = await gateway.http.get("/v1/models", headers=key.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
    assert refused.headers["retry-after"] == "1"
    gate.set()
    assert [r.status_code for r in await asyncio.gather(*running)] == [204, 204]
    for _ in range(10):  # each place is back before its response has ended
        assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 200


async def test_a_client_that_leaves_gives_its_place_back(
    gateway: Gateway, backend: Backend, directory: Directory, redis: Redis
) -> None:
    async def never(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    backend.handlers["/v1/chat/completions"] = never
    key = await directory.create_key(limits={"concurrency": 30})
    running = [asyncio.create_task(gateway.http.post("/v1/chat/completions", headers=key.headers)) for _ in range(30)]

    async def leases() -> int:
        names = [name async for name in redis.scan_iter(f"{{{key.org_id}}}:leases:*")]
        return sum([await redis.zcard(name) for name in names])

    async def all_in() -> bool:
        return await leases() == 30

    async def none_in() -> bool:
        return await leases() == 0

    await eventually(all_in)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await eventually(none_in)


async def test_users_have_limits_of_their_own(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    tokens = Tokens(await directory.create_session())
    backend.handlers["/.well-known/jwks.json"] = tokens.serve
    configured = settings(components.redis_url, database_url, backend.url, gateway_user_per_minute=3)
    async with gateway(configured) as running:
        headers = {"authorization": f"Bearer {tokens.sign()}"}
        statuses = [(await running.http.get("/v1/models", headers=headers)).status_code for _ in range(5)]
        assert statuses == [200] * 3 + [429] * 2
        headers = {"authorization": f"Bearer {tokens.sign(**await directory.create_session())}"}
        assert (await running.http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/api/v1/auth/register", "/api/v1/auth/login"])
async def test_addresses_have_limits_on_public_paths(
    components: Components, database_url: str, backend: Backend, path: str
) -> None:
    configured = settings(
        components.redis_url,
        database_url,
        backend.url,
        gateway_anonymous_per_minute=3,
        trusted_proxies="127.0.0.1/32",
    )
    async with gateway(configured) as running:
        for network in (f"2001:db8:{time.time_ns() % 65_536:x}:{i:x}" for i in range(2)):
            statuses = [
                (await running.http.post(path, headers={"x-forwarded-for": f"{network}::{i}"})).status_code
                for i in range(5)
            ]
            assert statuses == [200] * 3 + [429] * 2
    assert [seen.identity.kind for seen in backend.seen if seen.path == path][-1] == "anonymous"


async def test_a_weighty_route_draws_more(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    configured = settings(components.redis_url, database_url, backend.url, gateway_weights={"/v1/embeddings": 3})
    key = await directory.create_key(limits={"minute": 7})
    async with gateway(configured) as running:
        for expected in (200, 200, 429):
            response = await running.http.post("/v1/embeddings", headers=key.headers)
            assert response.status_code == expected
        assert response.headers["x-ratelimit-remaining-requests"] == "1"
        assert (await running.http.get("/v1/models", headers=key.headers)).status_code == 200
        assert (await running.http.get("/v1/models", headers=key.headers)).status_code == 429


def test_a_weight_for_no_route_is_refused() -> None:
    with pytest.raises(ValidationError, match="no such route: /v2"):
        settings("redis://x", "postgresql://x", "http://x", gateway_weights={"/v2": 2})


async def test_ceilings_of_users_and_organisations_hold_over_all_their_keys(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    """The installation's over every organisation; a plan's own before it."""
    configured = settings(
        components.redis_url,
        database_url,
        backend.url,
        gateway_user_ceiling_per_minute=4,
        gateway_organization_ceiling_per_minute=5,
    )
    first = await directory.create_key()
    second = await directory.create_key(like=first)
    async with gateway(configured) as running:
        for key in (first, second, first, second):
            response = await running.http.get("/v1/models", headers=key.headers)
            assert response.status_code == 200
        assert response.headers["ratelimit-policy"].endswith('"user-minute";q=4;w=60,"organization-minute";q=5;w=60')
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        refused = await running.http.get("/v1/models", headers=first.headers)
        assert refused.status_code == 429
        assert "limit of the user of 4 requests per minute" in refused.json()["error"]["message"]

    limits = '{"user": {"minute": 100}, "organization": {"minute": 2, "concurrency": 9}}'
    plan = await _create_plan(directory, limits)
    third = await directory.create_key(plan=plan)
    async with gateway(configured) as running:
        statuses = [(await running.http.get("/v1/models", headers=third.headers)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


async def _create_plan(directory: Directory, limits: str) -> str:
    """A plan like the default one, with more in its limits (JSON)."""
    name = uuid4().hex
    await directory.connection.execute(
        "INSERT INTO auth.plan (name, description, limits) "
        "SELECT $1, description, limits || $2::text::jsonb FROM auth.plan WHERE name = 'default'",
        name,
        limits,
    )
    return name
