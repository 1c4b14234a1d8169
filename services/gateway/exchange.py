"""One request and its response, as the gateway's parts see it."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Message, Receive, Scope, Send

from shared import errors, ids
from shared.errors import TollgateError
from shared.identity import Identity

RawHeaders = list[tuple[bytes, bytes]]

SECURITY_HEADERS: RawHeaders = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
STRICT_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")


class Exchange:
    """The request's facts, and `send_*` for the response; counts bytes and remembers the status for the log."""

    __slots__ = (
        "_receive",
        "_send",
        "address",
        "build",
        "bytes_in",
        "bytes_out",
        "complete",
        "extra_headers",
        "first",
        "identity",
        "method",
        "path",
        "query",
        "raw_headers",
        "raw_path",
        "request_id",
        "route",
        "service",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_path: bytes = scope["raw_path"]
        self.query: bytes = scope["query_string"]
        self.raw_headers: RawHeaders = scope["headers"]
        self.first: dict[bytes, bytes] = {}
        for name, value in self.raw_headers:
            self.first.setdefault(name, value)
        self.request_id = ids.accepted_request_id(self.header(b"x-request-id"))
        self.address = ""
        self.identity: Identity | None = None
        self.route = "unmatched"
        self.service = ""
        self.extra_headers: dict[str, str] = {}
        self.status = 0
        self.build = ""
        self.complete = False
        self.bytes_in = 0
        self.bytes_out = 0

    def header(self, name: bytes) -> str | None:
        """The first header of that (lower-case) name."""
        value = self.first.get(name)
        return None if value is None else value.decode("latin-1")

    async def receive(self) -> Message:
        """The next message of the request."""
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        return message

    async def start(
        self, status: int, headers: Iterable[tuple[bytes, bytes]], policy: tuple[bytes, bytes] = STRICT_POLICY
    ) -> None:
        """Begin the response; the request id, the security headers and the limits' headers are added here."""
        self.status = status
        own = [*headers, (b"x-request-id", self.request_id.encode()), policy, *SECURITY_HEADERS]
        own += [(k.encode("latin-1"), v.encode("latin-1")) for k, v in self.extra_headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": own})

    async def body(self, data: bytes, *, more: bool) -> None:
        """A piece of the body; waits while the client is slower than we are."""
        self.bytes_out += len(data)
        if not more:
            self.complete = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def respond(
        self, status: int, headers: RawHeaders, data: bytes, policy: tuple[bytes, bytes] = STRICT_POLICY
    ) -> None:
        """A whole response."""
        length = (b"content-length", str(len(data)).encode())
        await self.start(status, [*headers, length], policy)
        await self.body(b"" if self.method == "HEAD" else data, more=False)

    async def fail(self, error: TollgateError) -> None:
        """Answer with an error in the dialect of the path. The response must not have begun."""
        status, headers, data = errors.render(error, path=self.path, request_id=self.request_id)
        self.extra_headers = {}
        raw = [(k.encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers.items() if k != "x-request-id"]
        await self.respond(status, [*raw, (b"cache-control", b"no-store")], data)
