"""What every response has, what never reaches a service, and what never leaves one."""

import base64
from typing import Any

import pytest

from shared.clock import SystemClock
from shared.identity import HEADER, Identity, IdentityRing
from tests.conftest import Components
from tests.gateway.harness import IDENTITY_KEYS, Backend, Directory, Gateway, answer, gateway, settings


async def test_a_request_with_a_key_is_relayed_with_its_identity(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key(models=["chat-mini"])
    response = await gateway.http.post("/v1/chat/completions?a=1%202", json={"x": 1}, headers=key.headers)
    assert response.status_code == 200, response.text
    assert response.json()["path"] == "/v1/chat/completions"
    seen = backend.last
    assert (seen.method, seen.query, seen.body) == ("POST", "a=1%202", b'{"x":1}')
    identity = seen.identity
    assert (identity.kind, identity.org_id, identity.key_id) == ("key", str(key.org_id), str(key.key_id))
    assert identity.models == ("chat-mini",)
    assert identity.address == "127.0.0.1"
    assert identity.limit_id
    assert identity.tokens_per_minute > 0
    assert seen.header("x-request-id") == response.headers["x-request-id"]


@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer {}", "ApiKey {}", "{}", "X-API-Key"])
async def test_every_way_to_show_a_key(gateway: Gateway, directory: Directory, scheme: str) -> None:
    key = await directory.create_key()
    headers = {"x-api-key": key.secret} if scheme == "X-API-Key" else {"authorization": scheme.format(key.secret)}
    assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 200


async def test_what_must_not_reach_a_service_does_not(gateway: Gateway, backend: Backend, directory: Directory) -> None:
    key = await directory.create_key()
    forged = IdentityRing(IDENTITY_KEYS, SystemClock()).sign(Identity(kind="key", org_id="somebody else"))
    headers = [
        ("authorization", f"Bearer {key.secret}"),
        (HEADER, forged),
        ("X-Tollgate-Anything", "1"),
        ("x-forwarded-for", "1.2.3.4"),
        ("forwarded", "for=1.2.3.4"),
        ("x-real-ip", "1.2.3.4"),
        ("connection", "keep-alive, x-private"),
        ("x-private", "1"),
        ("te", "trailers"),
        ("upgrade", "h2c"),
        ("proxy-authorization", "Basic eA=="),
        ("accept-encoding", "br"),
        ("x-custom", "kept"),
    ]
    response = await gateway.http.request("GET", "/v1/models", headers=headers)
    assert response.status_code == 200
    seen = backend.last
    names = [name for name, _ in seen.headers]
    assert [n for n in names if n.startswith("x-tollgate-")] == [HEADER]
    assert seen.identity.org_id == str(key.org_id)
    assert seen.header("x-forwarded-for") == "127.0.0.1"
    for name in ("authorization", "x-private", "te", "upgrade", "forwarded", "x-real-ip", "proxy-authorization"):
        assert name not in names
    assert (seen.header("accept-encoding"), seen.header("x-custom")) == ("br", "kept")
    assert key.secret not in str(seen)


async def test_what_must_not_leave_a_service_does_not(gateway: Gateway, backend: Backend, directory: Directory) -> None:
    async def chatty(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [
            (b"server", b"secret/1.0"),
            (b"x-powered-by", b"secret"),
            (b"x-tollgate-internal", b"secret"),
            (b"x-request-id", b"another"),
            (b"x-ratelimit-limit-requests", b"999"),
            (b"x-ratelimit-limit-tokens", b"5"),
            (b"connection", b"x-hop"),
            (b"x-hop", b"secret"),
            (b"set-cookie", b"a=1"),
            (b"set-cookie", b"b=2"),
            (b"content-encoding", b"gzip"),
            (b"x-custom", b"kept"),
        ]
        await answer(send, 201, b"not really gzip", headers)

    backend.handlers["/v1/models"] = chatty
    key = await directory.create_key()
    async with gateway.http.stream("GET", "/v1/models", headers=key.headers) as response:
        body = b"".join([piece async for piece in response.aiter_raw()])
    assert (response.status_code, body) == (201, b"not really gzip")
    assert "secret" not in str(response.headers)
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["x-ratelimit-limit-requests"] == "60"
    assert response.headers["x-ratelimit-limit-tokens"] == "5"
    assert response.headers["x-custom"] == "kept"
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert len(response.headers.get_list("date")) == 1


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/keys", "/nothing", "/v1/nothing", "/healthz", "/docs"])
async def test_every_response_has_an_id_and_the_security_headers(gateway: Gateway, path: str) -> None:
    response = await gateway.http.get(path, headers={"x-request-id": "mine-12345"})
    assert response.headers["x-request-id"] == "mine-12345"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert "server" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/api/v2/nothing", 404, "not_found"),
        ("GET", "/metrics", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/api/v1/auth/login", 405, "method_not_allowed"),
        ("POST", "/docs", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", 401, "invalid_api_key"),
        ("GET", "/api/v1/billing/wallet", 401, "invalid_api_key"),
        ("GET", "/v1/models/%2e%2e/%2e%2e/api/v1/keys", 400, "invalid_path"),
        ("GET", "/v1/models/%00", 400, "invalid_path"),
        ("GET", "/v1/models/" + "a" * 9_000, 414, "uri_too_long"),
    ],
)
async def test_errors_speak_the_dialect_of_the_path(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    response = await gateway.http.request(method, path)
    assert response.status_code == status
    if path.startswith("/v1/"):
        assert response.headers["content-type"] == "application/json"
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == code
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == code
        assert response.json()["request_id"] == response.headers["x-request-id"]
    if status == 405:
        assert response.headers["allow"]


async def test_headers_have_a_limit(gateway: Gateway) -> None:
    assert (await gateway.http.get("/v1/models", headers={"x-long": "a" * 40_000})).status_code == 431
    assert (await gateway.http.get("/v1/models", headers={f"x-{i}": "a" for i in range(120)})).status_code == 431


async def test_two_credentials_are_none(gateway: Gateway, directory: Directory) -> None:
    key = await directory.create_key()
    headers = [("authorization", f"Bearer {key.secret}")] * 2
    assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 401


async def test_addresses_are_believed_only_from_trusted_proxies(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key()
    forwarded = {**key.headers, "x-forwarded-for": "6.6.6.6, 203.0.113.9, 10.1.2.3"}
    configured = settings(components.redis_url, database_url, backend.url, trusted_proxies="127.0.0.0/8, 10.0.0.0/8")
    async with gateway(configured) as behind_proxies:
        await behind_proxies.http.get("/v1/models", headers=forwarded)
    assert backend.last.identity.address == "203.0.113.9"
    assert backend.last.header("x-forwarded-for") == "203.0.113.9"


async def test_metrics_stand_on_the_internal_listener_only(gateway: Gateway, directory: Directory) -> None:
    key = await directory.create_key()
    await gateway.http.get("/v1/models", headers=key.headers)
    assert await gateway.metric("tollgate_http_requests_total", route="/v1/models", status="200") == 1
    assert await gateway.metric("tollgate_gateway_admissions_total", decision="admitted") == 1
    assert (await gateway.http.get("/metrics")).status_code == 404
    assert (await gateway.http.get(f"{gateway.internal_url}/readyz")).json()["status"] == "ok"


async def test_neither_keys_nor_bodies_are_logged(
    gateway: Gateway, directory: Directory, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    key = await directory.create_key()
    secret_body = base64.b64encode(b"a private prompt").decode()
    await gateway.http.post("/v1/chat/completions", content=secret_body, headers=key.headers)
    await gateway.http.post("/v1/nothing", content=secret_body, headers=key.headers)
    out, err = capfd.readouterr()
    for text in (out, err, caplog.text):
        assert key.secret not in text
        assert secret_body not in text
