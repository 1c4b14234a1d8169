"""The edges that every service shares: ids, errors, limits, identity, health."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.types import Message
from structlog.testing import capture_logs

from shared import web
from shared.clock import SystemClock
from shared.errors import Conflict, Unavailable
from shared.identity import HEADER, Identity, IdentityRing
from shared.telemetry import new_registry


class Body(BaseModel):
    name: str


@pytest.fixture(scope="module")
def ring() -> IdentityRing:
    return IdentityRing(f"a:{base64.b64encode(b'a' * 32).decode()}", SystemClock())


@pytest.fixture
def readiness() -> web.Readiness:
    return web.Readiness()


@pytest.fixture
def app(ring: IdentityRing, readiness: web.Readiness) -> FastAPI:
    app = web.create_app("test", ring=ring, registry=new_registry(), readiness=readiness)

    @app.get("/api/v1/whoami")
    async def whoami(identity: web.Caller) -> dict[str, str]:
        return {"user_id": identity.user_id}

    @app.post("/v1/echo/{part}")
    async def echo(part: str, body: Body) -> Body:
        return body

    @app.post("/v1/raw")
    async def raw(request: Request) -> str:
        return (await request.body()).decode()

    @app.get("/v1/crash")
    async def crash() -> None:
        raise RuntimeError("password=hunter2")

    @app.get("/api/v1/conflict")
    async def conflict() -> None:
        raise Conflict("Choose another name.", code="name_taken", detail="hunter2")

    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_only_the_gateways_identity_is_believed(client: httpx.AsyncClient, ring: IdentityRing) -> None:
    token = ring.sign(Identity(kind="user", user_id="u1"))
    assert (await client.get("/api/v1/whoami", headers={HEADER: token})).json() == {"user_id": "u1"}
    for headers in ({}, {HEADER: "v1.a.e30.AAAA"}, {HEADER: ring.sign(Identity(kind="anonymous"))}):
        assert (await client.get("/api/v1/whoami", headers=headers)).status_code == 401


async def test_a_validation_error_names_the_field_in_the_paths_dialect(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/echo/x", json={"name": 5})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "name"
    assert answer.json()["error"]["code"] == "invalid_request"


async def test_broken_json_is_said_so(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/echo/x", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_a_crash_answers_without_a_word_of_it(client: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        answer = await client.get("/v1/crash")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "hunter2" not in answer.text
    assert any(entry["event"] == "request_crashed" for entry in logs)


async def test_errors_of_ours_and_of_the_router_speak_problem_json(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/v1/conflict")
    assert (answer.status_code, answer.json()["code"], answer.json()["detail"]) == (
        409,
        "name_taken",
        "Choose another name.",
    )
    assert (await client.get("/nowhere")).json()["code"] == "not_found"
    assert (await client.delete("/api/v1/conflict")).status_code == 405


async def test_every_answer_carries_one_request_id(client: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/nowhere", "/v1/crash", "/api/v1/conflict"):
        answer = await client.get(path, headers={"x-request-id": "caller-chosen-1"})
        assert answer.headers.get_list("x-request-id") == ["caller-chosen-1"]
    assert (await client.get("/healthz", headers={"x-request-id": "no good"})).headers["x-request-id"][:4] == "req_"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_whether_declared_or_not(
    client: httpx.AsyncClient, declared: bool
) -> None:
    body = b'{"name": "' + b"x" * web.BODY_BYTES_MAX + b'"}'

    async def chunks() -> AsyncIterator[bytes]:
        for i in range(0, len(body), 65_536):
            yield body[i : i + 65_536]

    content: Any = body if declared else chunks()
    answer = await client.post("/v1/echo/x", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


async def test_readiness_names_what_is_not_ready_and_health_does_not_care(
    client: httpx.AsyncClient, readiness: web.Readiness
) -> None:
    async def down() -> None:
        raise Unavailable(detail="hunter2")

    async def fine() -> None: ...

    readiness.add("good", fine)
    assert (await client.get("/readyz")).json() == {"status": "ok", "checks": {"good": "ok"}}
    readiness.add("bad", down)
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["bad"]) == (503, "service_unavailable")
    assert (await client.get("/healthz")).status_code == 200
    readiness.draining = True
    assert (await client.get("/readyz")).json()["checks"]["process"] == "draining"


async def test_metrics_are_by_route_template_never_by_raw_path(client: httpx.AsyncClient) -> None:
    await client.post("/v1/echo/secret-part", json={"name": "n"})
    await client.get("/random-path-of-an-attacker")
    text = (await client.get("/metrics")).text
    assert 'route="/v1/echo/{part}"' in text
    assert 'route="unmatched"' in text
    assert "secret-part" not in text
    assert "attacker" not in text


async def test_the_access_log_has_the_agreed_fields(client: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        await client.post("/v1/echo/x", json={"name": "a prompt"})
    (entry,) = [e for e in logs if e["event"] == "request"]
    assert {"endpoint", "method", "status_code", "response_time_ms"} <= set(entry)
    assert "a prompt" not in json.dumps(entry)


@pytest.mark.parametrize("path", ["/v1/raw", "/v1/echo/x"])
async def test_a_client_that_leaves_before_its_body_is_complete_is_no_crash(app: FastAPI, path: str) -> None:
    body: Message = {"type": "http.request", "body": b'{"na', "more_body": True}
    messages: Iterator[Message] = iter([body, {"type": "http.disconnect"}])

    async def receive() -> Message:
        return next(messages)

    async def send(_: Message) -> None: ...

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    headers = [(b"content-type", b"application/json"), (b"content-length", b"20")]
    with capture_logs() as logs:
        await app({**scope, "headers": headers}, receive, send)
    assert [(e["event"], e["status_code"]) for e in logs] == [("request", web.CLIENT_CLOSED_REQUEST)]
