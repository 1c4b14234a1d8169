"""One request and its response, as the gateway's parts see it; and as its own pages answer it."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.trace import Span
from starlette.types import Receive, Scope, Send

from services.gateway.heads import RawHeaders
from shared import errors, ids
from shared.errors import TollgateError
from shared.identity import Identity

SECURITY_HEADERS: RawHeaders = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
STRICT_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
TRANSPORT_POLICY = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")


class Exchange:
    """The facts that log, metrics and usage want. A status of 0: no response has begun."""

    method = ""
    path = ""
    route = "unmatched"
    service = ""
    request_id = ""
    address = ""
    identity: Identity | None = None
    span: Span | None = None
    status = 0
    build = ""
    complete = False
    bytes_in = 0
    bytes_out = 0


class PageExchange(Exchange):
    """An exchange over ASGI."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.method = scope["method"]
        self.path = scope["path"]
        self.raw_headers: RawHeaders = scope["headers"]
        self.url: bytes = scope["raw_path"] + b"?" + scope["query_string"]
        offered = next((value for name, value in self.raw_headers if name == b"x-request-id"), b"")
        self.request_id = ids.accepted_request_id(offered.decode("latin-1"))
        self.address = scope["client"][0] if scope.get("client") else ""
        self.extra_headers: RawHeaders = []

    async def start(
        self, status: int, headers: Iterable[tuple[bytes, bytes]], policy: tuple[bytes, bytes] = STRICT_POLICY
    ) -> None:
        """Begin the response; the request id and the security headers are added here."""
        self.status = status
        own = [(b"x-request-id", self.request_id.encode()), policy, *SECURITY_HEADERS, *self.extra_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *own]})

    async def respond(
        self, status: int, headers: RawHeaders, data: bytes, policy: tuple[bytes, bytes] = STRICT_POLICY
    ) -> None:
        """A whole response."""
        await self.start(status, [*headers, (b"content-length", str(len(data)).encode())], policy)
        body = b"" if self.method == "HEAD" else data
        await self._send({"type": "http.response.body", "body": body})
        self.bytes_out += len(body)
        self.complete = True

    async def fail(self, error: TollgateError) -> None:
        """Answer with an error in the dialect of the path, unless the response has begun."""
        if self.status:
            return
        status, headers, data = errors.render(error, path=self.path, request_id=self.request_id)
        raw = [(k.encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers.items() if k != "x-request-id"]
        await self.respond(status, [*raw, (b"cache-control", b"no-store")], data)
