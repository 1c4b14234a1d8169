"""The gateway's own pages: health, documentation that needs nothing from outside, one OpenAPI document."""

import asyncio
import json
import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis

from deploy.local.ports import pick_port
from services.auth.clients import UsageStream
from services.auth.domain import DailyUse
from services.gateway.openapi import merge
from services.gateway.upstreams import ROUTES, RouteTable
from shared.apikeys import USAGE_STREAM
from tests.conftest import Components
from tests.gateway.harness import Backend, Directory, Gateway, answer, gateway, settings
from tests.gateway.outages import DEADLINE_S, eventually


def part(paths: list[str], schema: dict[str, Any]) -> dict[str, Any]:
    """What a service offers: each path with a GET and a POST that name the schema `Item`."""
    operation = {
        "operationId": "op",
        "security": [{"own": []}],
        "responses": {"200": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Item"}}}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "x", "version": "1", "description": "one of them"},
        "paths": {path: {"get": operation, "post": operation} for path in paths},
        "components": {"schemas": {"Item": schema, "Holder": {"items": {"$ref": "#/components/schemas/Item"}}}},
    }


def references(value: Any) -> set[str]:
    found: list[str] = re.findall(r'"\$ref": "([^"]+)"', json.dumps(value))
    return set(found)


def merged(**parts: dict[str, Any]) -> dict[str, Any]:
    return merge(parts, RouteTable(), public_url="https://api.example.com", version="1")


def test_only_public_paths_of_their_owner_are_documented() -> None:
    document = merged(
        auth=part(["/api/v1/keys", "/internal", "/metrics", "/v1/models", "/api/v1/auth/login"], {"type": "string"}),
        chat=part(["/v1/models", "/v1/models/{id}"], {"type": "string"}),
    )
    assert sorted(document["paths"]) == ["/api/v1/auth/login", "/api/v1/keys", "/v1/models", "/v1/models/{id}"]
    assert document["paths"]["/v1/models"]["get"]["tags"] == ["chat"]
    assert "post" not in document["paths"]["/v1/models"]  # the gateway does not let it through
    assert document["servers"] == [{"url": "https://api.example.com"}]


def test_security_follows_the_route_table() -> None:
    document = merged(auth=part(["/api/v1/auth/login", "/api/v1/auth/me", "/api/v1/keys"], {"type": "string"}))
    schemes = document["components"]["securitySchemes"]
    asked = {path: item["post"]["security"] for path, item in document["paths"].items()}
    assert asked == {
        "/api/v1/auth/login": [],
        "/api/v1/auth/me": [{"accessToken": []}],
        "/api/v1/keys": [{"bearer": []}, {"apiKey": []}],
    }
    assert {name for uses in asked.values() for use in uses for name in use} <= set(schemes)


def test_schemas_of_one_name_do_not_clash() -> None:
    document = merged(
        auth=part(["/api/v1/keys"], {"type": "string"}),
        billing=part(["/api/v1/billing/wallet"], {"type": "integer"}),
        chat=part(["/v1/models"], {"type": "string"}),
    )
    schemas = document["components"]["schemas"]
    assert schemas["Item"] == {"type": "string"}
    assert schemas["BillingItem"] == {"type": "integer"}
    for reference in references(document):
        assert reference.rpartition("/")[2] in schemas
    assert "BillingItem" in str(document["paths"]["/api/v1/billing/wallet"])
    assert "BillingItem" not in str(document["paths"]["/v1/models"])


def test_operation_ids_are_unique() -> None:
    document = merged(
        auth=part(["/api/v1/keys"], {"type": "string"}), billing=part(["/api/v1/billing/wallet"], {"type": "string"})
    )
    assert document["paths"]["/api/v1/keys"]["get"]["operationId"] == "auth_op"
    assert document["paths"]["/api/v1/billing/wallet"]["get"]["operationId"] == "billing_op"


async def test_the_document_survives_a_service_that_is_down(
    components: Components, database_url: str, backend: Backend
) -> None:
    offered = json.dumps(part(["/v1/models", "/api/v1/keys"], {"type": "string"})).encode()

    async def openapi(_scope: Any, _receive: Any, send: Any) -> None:
        await answer(send, 200, offered)

    backend.handlers["/openapi.json"] = openapi
    nowhere = f"http://127.0.0.1:{pick_port()}"
    async with gateway(settings(components.redis_url, database_url, backend.url, auth_url=nowhere)) as running:

        async def is_there() -> bool:  # a service that was too late is asked again after some seconds
            document = (await running.http.get("/openapi.json")).json()
            return list(document["paths"]) == ["/v1/models"]

        await eventually(is_there)


async def test_readiness_and_documentation_cost_the_services_no_more_for_many_visitors(
    components: Components, database_url: str, backend: Backend
) -> None:
    nowhere = f"http://127.0.0.1:{pick_port()}"
    asked: Counter[str] = Counter()

    async def count(scope: Any, _receive: Any, send: Any) -> None:
        asked[scope["path"]] += 1
        await answer(send, 200, b'{"paths": {}}')

    backend.handlers["/openapi.json"] = backend.handlers["/healthz"] = count
    configured = settings(
        components.redis_url, database_url, backend.url, auth_url=nowhere, gateway_services_interval_s=3_600
    )
    async with gateway(configured) as running:
        await running.ready(billing="ok", chat="ok", inference="ok")
        for path in ("/readyz", "/openapi.json"):
            responses = await asyncio.gather(*(running.http.get(path) for _ in range(20)))
            assert {r.status_code for r in responses} == {200}
            assert len({r.content for r in responses}) == 1
    assert asked == {"/healthz": 3, "/openapi.json": 3}  # one for each service that there is


async def test_docs_need_nothing_from_outside(gateway: Gateway) -> None:
    page = await gateway.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 4
    for asset in assets:
        assert asset.startswith("/docs/")
        response = await gateway.http.get(asset)
        assert response.status_code == 200
        assert response.content
    assert "SwaggerUIBundle" in (await gateway.http.get("/docs/start.js")).text
    assert (await gateway.http.get("/docs/../settings.py")).status_code in (400, 404)
    assert (await gateway.http.get("/docs/nothing")).status_code == 404


async def test_head_has_no_body(gateway: Gateway) -> None:
    response = await gateway.http.head("/healthz")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: r.prefix)
def test_every_route_finds_itself(route: Any) -> None:
    table = RouteTable()
    assert table.find(route.prefix) == route
    assert table.find(route.prefix.rstrip("/") + "x") != route
    if not route.exact:
        assert table.find(route.prefix.rstrip("/") + "/below") == route


async def test_usage_events_say_who_and_how(
    gateway: Gateway, directory: Directory, redis: Redis, backend: Backend
) -> None:
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await answer(send, 200, b"{}", [(b"x-tollgate-build", b"tiny-q8_0")])

    backend.handlers["/v1/chat/completions"] = serve
    key = await directory.create_key()
    response = await gateway.http.post(
        "/v1/chat/completions?secret=1", content=b"0123456789", headers={**key.headers, "x-request-id": "usage-test-1"}
    )
    async with asyncio.timeout(DEADLINE_S):
        while not (events := await _events(redis, "usage-test-1")):
            await asyncio.sleep(0.05)
    [event] = events
    assert (event["v"], event["kind"], event["key_id"]) == (1, "key", str(key.key_id))
    assert (event["org_id"], event["user_id"]) == (str(key.org_id), str(key.user_id))
    assert (event["service"], event["route"], event["status"]) == ("chat", "/v1/chat/completions", 200)
    assert (event["bytes_in"], event["bytes_out"]) == (10, len(response.content))
    assert event["duration_ms"] > 0
    assert (event["path"], event["build"]) == ("/v1/chat/completions", "tiny-q8_0")
    assert "x-tollgate-build" not in response.headers
    assert key.secret not in str(event)


async def test_auth_reads_from_them_when_a_key_was_last_used(
    gateway: Gateway, directory: Directory, redis: Redis
) -> None:
    """Both halves as they are: the gateway's writer, auth's reader."""
    stream = UsageStream(redis)
    while (await stream.read(1_000)).events:  # what earlier tests left; the first may only have made the group
        pass
    key = await directory.create_key()
    began = datetime.now(UTC)
    assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 200
    uses: dict[UUID, datetime] = {}
    daily: dict[UUID, list[DailyUse]] = {}

    async def arrived() -> bool:
        batch = await stream.read(1_000)
        uses.update(batch.last_uses)
        daily.update(batch.daily_uses)
        return key.key_id in uses

    await eventually(arrived)
    assert began <= uses[key.key_id] <= datetime.now(UTC)
    [use] = daily[key.key_id]
    assert (use.day, use.requests, use.client_errors) == (uses[key.key_id].date(), 1, 0)
    assert use.bytes_out > 0


async def _events(redis: Redis, request_id: str) -> list[dict[str, Any]]:
    entries: Any = await redis.xrange(USAGE_STREAM)
    events = [json.loads(fields[b"event"]) for _, fields in entries]
    return [event for event in events if event["request_id"] == request_id]
