"""Access tokens: only ES256, only auth's, only now; and what a user may do that a key may not."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from shared import apikeys
from shared.access_tokens import version_name
from tests.conftest import Components
from tests.gateway.harness import Backend, Directory, Gateway, gateway, settings
from tests.gateway.outages import eventually
from tests.gateway.signing import Tokens


@pytest_asyncio.fixture
async def tokens(backend: Backend, directory: Directory) -> AsyncIterator[Tokens]:
    tokens = Tokens(await directory.create_session())
    backend.handlers["/.well-known/jwks.json"] = tokens.serve
    yield tokens


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def test_a_token_carries_its_user(
    tokens: Tokens, gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    session = await directory.create_session()
    response = await gateway.http.get("/api/v1/auth/me", headers=bearer(tokens.sign(**session)))
    assert response.status_code == 200, response.text
    identity = backend.last.identity
    assert identity.kind == "user"
    assert {"sub": identity.user_id, "org": identity.org_id, "sid": identity.session_id} == session
    assert identity.has_scope("keys:write")
    assert not identity.has_scope("admin")
    assert identity.address == "127.0.0.1"


async def test_what_is_not_auths_token_is_refused(tokens: Tokens, gateway: Gateway) -> None:
    other = Tokens()
    now = int(time.time())
    shared_secret = "an hmac key, to be taken for a signature"
    refused = [
        tokens.sign(exp=now - 1),
        tokens.sign(exp=None),
        tokens.sign(iss="somebody"),
        tokens.sign(iss=None),
        tokens.sign(aud="somebody"),
        tokens.sign(aud=None),
        tokens.sign(type="refresh"),
        tokens.sign(type=None),
        tokens.sign(sub=None),
        tokens.sign(sub=""),
        tokens.sign(org=None),
        tokens.sign(roles=None),
        tokens.sign(scope=None),
        tokens.sign(ver=None),
        tokens.sign(ver=2),
        tokens.sign(sid=None),
        tokens.sign(sid=str(uuid4())),
        tokens.sign(sub=str(uuid4())),
        tokens.sign(kid="unknown"),
        other.sign(kid=tokens.kid),
        tokens.sign(algorithm="HS256", key=shared_secret),
        tokens.sign()[:-4] + "AAAA",
        "a.b.c",
    ]
    answers = set()
    for token in [*refused, apikeys.generate()]:
        headers = {**bearer(token), "x-request-id": "same-for-all"}
        response = await gateway.http.get("/v1/models", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), token
        answers.add((str(sorted((k, v) for k, v in response.headers.items() if k != "date")), response.text))
    assert len(answers) == 1
    assert (await gateway.http.get("/v1/models", headers=bearer(tokens.sign()))).status_code == 200


async def test_expiry_is_judged_at_use(tokens: Tokens, gateway: Gateway) -> None:
    for life_s in (2, 10, 50):
        token = tokens.sign(exp=int(time.time()) + life_s)

        async def status(token: str = token) -> int:
            return (await gateway.http.get("/v1/models", headers=bearer(token))).status_code

        async def is_refused() -> bool:
            return await status() == 401

        if await status() == 200:  # on a busy machine it may be over before it was ever shown
            await eventually(is_refused)
            return
    raise AssertionError("it never worked")


async def test_a_new_signing_key_is_fetched_when_its_first_token_comes(
    tokens: Tokens, gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    assert (await gateway.http.get("/v1/models", headers=bearer(tokens.sign()))).status_code == 200
    for _ in range(2):
        rotated = Tokens(await directory.create_session())
        backend.handlers["/.well-known/jwks.json"] = rotated.serve
        assert (await gateway.http.get("/v1/models", headers=bearer(rotated.sign()))).status_code == 200


async def test_a_session_that_ends_takes_its_tokens_along(
    tokens: Tokens, gateway: Gateway, directory: Directory, redis: Redis
) -> None:
    """At the next request after auth's answer; also for a gateway that never saw the token; and without the news."""
    session, silent, emptied = [await directory.create_session() for _ in range(3)]

    async def statuses(session: dict[str, str]) -> list[int]:
        headers = bearer(tokens.sign(**session))
        return [(await gateway.http.get("/v1/models", headers=headers)).status_code for _ in range(2)]

    assert await statuses(session) == [200, 200]
    await directory.end_session(session)
    assert await statuses(session) == [401, 401]
    await directory.end_session(silent, announce=False)  # its version was never in Redis
    assert await statuses(silent) == [401, 401]
    assert await statuses(emptied) == [200, 200]
    await directory.end_session(emptied, announce=False)
    await redis.delete(version_name(emptied["org"], emptied["sid"]))
    assert await statuses(emptied) == [401, 401]


async def test_unknown_signing_keys_cost_auth_a_few_fetches_at_most(
    tokens: Tokens, gateway: Gateway, backend: Backend
) -> None:
    fetches = 0

    async def count(scope: Any, receive: Any, send: Any) -> None:
        nonlocal fetches
        fetches += 1
        await tokens.serve(scope, receive, send)

    assert (await gateway.http.get("/v1/models", headers=bearer(tokens.sign()))).status_code == 200
    backend.handlers["/.well-known/jwks.json"] = count
    began = time.monotonic()
    for _ in range(5):
        forged = [bearer(tokens.sign(kid=uuid4().hex)) for _ in range(10)]
        await asyncio.gather(*(gateway.http.get("/v1/models", headers=headers) for headers in forged))
    assert 1 <= fetches <= 3 + 1 + (time.monotonic() - began) / 5  # one is the background's own


async def test_bad_tokens_of_one_address_are_bounded(
    tokens: Tokens, components: Components, database_url: str, backend: Backend
) -> None:
    configured = settings(components.redis_url, database_url, backend.url, gateway_unknown_keys_per_minute=5)
    good, forger = tokens.sign(), Tokens()
    async with gateway(configured) as running:
        assert (await running.http.get("/v1/models", headers=bearer(good))).status_code == 200
        forged = [bearer(forger.sign(kid=tokens.kid)) for _ in range(8)]
        refused = [await running.http.get("/v1/models", headers=headers) for headers in forged]
        assert [response.status_code for response in refused] == [401] * 5 + [429] * 3
        assert 0 < int(refused[-1].headers["retry-after"]) <= 60
        unknown = await running.http.get("/v1/models", headers={"x-api-key": apikeys.generate()})
        assert unknown.status_code == 429  # one limit for all that is wrong
        assert (await running.http.get("/v1/models", headers=bearer(good))).status_code == 200  # known: costs nothing


async def test_without_any_key_set_nobody_can_tell(gateway: Gateway) -> None:
    response = await gateway.http.get("/v1/models", headers=bearer(Tokens().sign()))
    assert response.status_code == 503
    assert response.headers["retry-after"]


@pytest.mark.parametrize(
    ("scopes", "roles", "path", "status"),
    [
        (("models",), ("user",), "/v1/models", 200),
        (("chat",), ("user",), "/v1/models", 403),
        (("*",), ("user",), "/v1/models", 200),
        (("billing:read",), ("user",), "/api/v1/billing/wallet", 200),
        (("chat",), ("user",), "/api/v1/billing/wallet", 403),
        (("keys:read",), ("user",), "/api/v1/keys", 200),
        (("*",), ("user",), "/api/v1/admin/auth/users", 403),
        (("admin",), ("user",), "/api/v1/admin/auth/users", 403),
        (("admin", "*"), ("admin",), "/api/v1/admin/auth/users", 200),
        (("chat",), ("admin",), "/api/v1/admin/auth/users", 403),
        (("chat",), ("user",), "/api/v1/auth/me", 403),
        (("chat",), ("user",), "/api/v1/organizations", 403),
        (("admin",), ("admin",), "/api/v1/organizations", 200),
    ],
)
async def test_what_a_key_may_reach(
    gateway: Gateway, directory: Directory, scopes: tuple[str, ...], roles: tuple[str, ...], path: str, status: int
) -> None:
    key = await directory.create_key(scopes=scopes, roles=roles)
    response = await gateway.http.get(path, headers=key.headers)
    assert response.status_code == status, response.text


@pytest.mark.parametrize(
    ("roles", "path", "status"),
    [
        (["user"], "/api/v1/organizations", 200),
        (["user"], "/api/v1/keys", 200),
        (["user"], "/api/v1/billing/wallet", 200),
        (["user"], "/api/v1/admin/auth/users", 403),
        (["operator"], "/api/v1/admin/auth/users", 200),
        (["admin"], "/api/v1/admin/billing/wallets", 200),
    ],
)
async def test_what_a_user_may_reach(
    tokens: Tokens, gateway: Gateway, roles: list[str], path: str, status: int
) -> None:
    response = await gateway.http.get(path, headers=bearer(tokens.sign(roles=roles)))
    assert response.status_code == status, response.text


async def test_public_paths_need_nothing_and_believe_nothing(
    tokens: Tokens, gateway: Gateway, backend: Backend
) -> None:
    for headers in ({}, bearer("junk"), bearer(tokens.sign())):
        response = await gateway.http.post("/api/v1/auth/login", json={}, headers=headers)
        assert response.status_code == 200
        assert backend.last.identity.kind == "anonymous"
        assert backend.last.header("authorization") is None
    assert (await gateway.http.get("/.well-known/jwks.json")).json()["keys"]
