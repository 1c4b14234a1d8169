"""No secret of anybody is in a log, a trace or a metric of the service: the process as it runs, all ways to sign in."""

import base64
import json
import secrets
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from services.auth.cli import migrate_urls
from shared.clock import SystemClock
from shared.identity import HEADER, Identity, IdentityRing
from tests.auth.harness import IDENTITY_KEYS, PASSWORD, PEPPERS, SECRET_KEY
from tests.auth.test_email import Postbox, server
from tests.auth.test_oidc import issuer, person
from tests.auth.test_process import environment, serving
from tests.gateway.outages import eventually

__all__ = ["environment", "issuer", "server"]  # fixtures of other modules
TIMEOUT_S = 60
CLIENT_SECRET = "the secret of tollgate at its provider"


@pytest.fixture(scope="module")
def telling(environment: dict[str, str], server: tuple[Postbox, str], issuer: str) -> dict[str, str]:
    """The service with everything that it may tell turned on."""
    migrate_urls(
        *(environment[f"TOLLGATE_{name}DATABASE_URL"] for name in ("", "AUTH_", "GATEWAY_")),
    )
    provider = (
        f'{{"name": "corp", "issuer": "{issuer}", "client_id": "tollgate-corp", "client_secret": "{CLIENT_SECRET}"}}'
    )
    return {
        **environment,
        "TOLLGATE_LOG_LEVEL": "DEBUG",
        "TOLLGATE_AUTH_REGISTRATION": "verified",
        "TOLLGATE_AUTH_SMTP_URL": server[1],
        "TOLLGATE_AUTH_EMAIL_LINK_URL": "https://app.example.com",
        "TOLLGATE_AUTH_EMAIL_INTERVAL_MS": "50",
        "TOLLGATE_AUTH_OIDC_PROVIDERS": f"[{provider}]",
        "TOLLGATE_AUTH_SELF_SERVICE_ORGS": "true",
    }


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where spans go: its address, and what came."""
    taken: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.append(zlib.decompress(body, 47) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", taken
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class Caller:
    """A client behind a gateway that signs. It remembers every secret that it sends or gets."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._ring = IdentityRing(IDENTITY_KEYS, SystemClock())
        self.seen: list[str] = []

    def post(self, path: str, body: dict[str, Any], identity: Identity | None = None, **sent: str) -> dict[str, Any]:
        header = self._ring.sign(identity or Identity("anonymous"))
        answer = self._http.post(path, json=body, headers={HEADER: header, **sent})
        found: dict[str, Any] = answer.json() if answer.content else {}
        self.seen += [header, *(value for name, value in {**body, **found}.items() if _is_secret(name, value))]
        self.seen += list(answer.cookies.values())
        return found

    def get(self, path: str, cookie: str = "") -> httpx.Response:
        header = self._ring.sign(Identity("anonymous"))
        answer = self._http.get(path, headers={HEADER: header, **({"cookie": cookie} if cookie else {})})
        self.seen += [header, *answer.cookies.values()]
        return answer


def _is_secret(name: str, value: Any) -> bool:
    return isinstance(value, str) and name in {
        *("password", "old_password", "new_password", "access_token", "refresh_token", "csrf_token", "key", "token"),
    }


async def _by_mail(caller: Caller, postbox: Postbox, name: str) -> None:
    """Registered, confirmed, the password forgotten and set anew; each also wrongly."""
    email = f"{name}@example.com"
    caller.post("/api/v1/auth/register", {"username": name, "email": email, "password": PASSWORD})
    await eventually(lambda: len(postbox.messages) == 1)
    body = {"token": postbox.token(), "password": PASSWORD}
    caller.post("/api/v1/auth/verify-email", {**body, "password": "wrong and secret all the same"})
    assert caller.post("/api/v1/auth/verify-email", body)["username"] == name
    caller.post("/api/v1/auth/verify-email", body)
    caller.post("/api/v1/auth/password/forgot", {"email": email})
    await eventually(lambda: len(postbox.messages) == 2)
    reset = {"token": postbox.token(), "new_password": f"{PASSWORD} renewed"}
    caller.post("/api/v1/auth/password/reset", {**reset, "new_password": "short s3cret"[:7]})
    assert caller.post("/api/v1/auth/password/reset", reset) == {}


async def _by_provider(caller: Caller, issuer: str) -> None:
    """Through the provider: once rightly, once with a code that is used up."""
    subject, _ = await person(issuer)
    begun = caller.get("/api/v1/auth/oidc/corp/start?return_to=/docs")
    sent_to = begun.headers["location"]
    consented = httpx.post(sent_to, data={"sub": subject}, timeout=TIMEOUT_S, trust_env=False)
    back = urlsplit(consented.headers["location"])
    cookie = f"tg_oidc={begun.cookies['tg_oidc']}"
    caller.seen += [values[0] for name, values in parse_qs(back.query).items() if name in ("code", "state")]
    caller.seen += [parse_qs(urlsplit(sent_to).query)["nonce"][0]]
    for expected in (303, 401):
        assert caller.get(f"{back.path}?{back.query}", cookie).status_code == expected


def _by_password(caller: Caller, name: str) -> None:
    """Signed in with and without cookies; a key, an invitation, a stolen refresh token, crashes of parsing."""
    body = {"username": name, "password": f"{PASSWORD} renewed"}
    caller.post("/api/v1/auth/login", {**body, "cookies": True})
    tokens = caller.post("/api/v1/auth/login", body)
    claims = json.loads(base64.urlsafe_b64decode(tokens["access_token"].split(".")[1] + "=="))
    identity = Identity(
        "user",
        user_id=claims["sub"],
        org_id=claims["org"],
        session_id=claims["sid"],
        scopes=("keys:write", "keys:read"),
    )
    key = caller.post("/api/v1/keys", {"name": "k"}, identity)
    caller.post("/api/v1/keys/leaked", {"key": key["key"]})
    caller.post(f"/api/v1/organizations/{identity.org_id}/invitations", {}, identity)
    caller.post("/api/v1/organizations/join", {"token": "tg_invite_" + secrets.token_urlsafe(32)}, identity)
    for _ in range(2):
        caller.post("/api/v1/auth/refresh", {"refresh_token": tokens["refresh_token"]})
    caller.post("/api/v1/auth/login", {"username": PASSWORD + " in the wrong field", "password": "another s3cret"})
    caller.post("/api/v1/auth/login", {"username": name, "password": "wrong, and s3cret"})
    caller.post(
        "/api/v1/auth/logout",
        {},
        None,
        authorization=f"Bearer {tokens['access_token']}",
        cookie="tg_access=a.b.c-cookie",
    )
    caller.seen += [PASSWORD, "a.b.c-cookie"]


async def test_no_secret_is_in_a_log_a_trace_or_a_metric(
    telling: dict[str, str], server: tuple[Postbox, str], issuer: str, tmp_path: Path
) -> None:
    log, name, postbox = tmp_path / "auth.log", f"user-{secrets.token_hex(4)}", server[0]
    postbox.messages.clear()
    with collector() as (endpoint, spans):
        with serving({**telling, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}, log) as http:
            caller = Caller(http)
            await _by_mail(caller, postbox, name)
            await _by_provider(caller, issuer)
            _by_password(caller, name)
            metrics = http.get("/metrics").text
        traces = b"".join(spans)
    caller.seen += [CLIENT_SECRET, SECRET_KEY, PEPPERS, IDENTITY_KEYS]
    told = {"log": log.read_bytes(), "metrics": metrics.encode(), "traces": traces}
    assert b"/api/v1/auth/verify-email" in told["log"]
    assert b"tollgate_auth_logins_total" in told["metrics"]
    assert b"/api/v1/auth/oidc/corp/callback" in told["traces"]
    found = {(where, secret[:12]) for where, text in told.items() for secret in caller.seen if secret.encode() in text}
    assert not found
    assert len(set(caller.seen)) > 20
