"""One request of a client, answered by one replica of the service that owns its path.

    ADMIT ──► CONNECT ──► SEND / WAIT ──head──► ANSWER ──end──► done
      │ 4xx     │ 503        │ 408 502 504         │ broken: the connection breaks as well
      └─────────┴────────────┴─────────────────────┴──────────── the client hangs up: 499, the service is hung up on

The first two are admitting.py, the rest callbacks of the two connections. Nothing is buffered but request bodies that
come before there is a connection (READ_AHEAD_BYTES), and responses that are known to be small: they go out in one
piece, or as a clean 502. Back-pressure: while one side does not take what it is given, the other is not read. A request
is sent again only when it was never sent: its connection was refused. A response that fails after it began ends without
its proper end, so that no client can take a broken stream for a complete one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.gateway.admitting import Admitting
from services.gateway.errors import RequestTimeout
from services.gateway.heads import RawHeaders, RequestHead, ResponseHead, read_request, read_response
from shared import errors, ids
from shared.errors import (
    BadGateway,
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    Timeout,
    TollgateError,
)

if TYPE_CHECKING:
    from services.gateway.client import Client
    from services.gateway.known import Asked
    from services.gateway.pool import UpstreamConnection
    from services.gateway.relay import Relay
    from services.gateway.upstreams import Route

READ_AHEAD_BYTES = 64 * 1024
WHOLE_BYTES_MAX = 64 * 1024
GZIP_LEVEL, GZIP_WBITS = 1, 31
BODILESS = (204, 304)
HOST = re.compile(rb"(?:[\w.~%!$&'()*+,;=-]+|\[[\dA-Fa-f:.]+\])(?::\d{0,5})?")  # RFC 3986
BODY_METHODS = ("POST", "PUT", "PATCH")
CLIENT_GONE_STATUS = 499  # nginx's number for it, in logs and metrics only
NO_STORE = b"cache-control: no-store\r\n"


class Relayed(Admitting):
    """See the module. `response_complete` and `keep_alive` mean to uvicorn what they mean in its own cycles."""

    response_complete = False
    due_s = end_s = began_s = 0.0
    _connection: UpstreamConnection | None = None
    _gzip: Any = None
    _is_chunked = _is_held = False
    _known: Mapping[bytes, bytes] = {}  # of the request's headers, once they are read
    _head_out = b""
    _status_out = 0

    def __init__(
        self, relay: Relay, client: Client, asked: Asked, length: int | None = None, body: bytes | None = None
    ) -> None:
        """`length`: of the body, where the head is known; `body`: the whole of it, where it is there."""
        self._relay = relay
        self._client = client
        self._asked = asked
        self._target = target = asked.target
        self.method = asked.method
        self.path = target.path
        self.keep_alive = asked.keep_alive
        self._is_http_10 = asked.version != "1.1"
        self._pieces: list[bytes] = []  # of the request's body, then of the response's
        self._length = length
        if body is not None:
            self.is_whole = True
            if body:
                self._pieces.append(body)
                self.bytes_in = len(body)

    # The client's side

    def start(self) -> None:
        """It is this request's turn."""
        self._relay.began(self)
        try:
            self._read()
        except TollgateError as e:
            if isinstance(e, InvalidRequest):
                self.keep_alive = False  # who breaks the rules of HTTP may mean something else by what follows
            self.fail(e)
            return
        if not self.response_complete:
            self.admit()

    def tell_to_close(self) -> None:
        """The connection is to end with this response, if its head can still say so."""
        if not self.status and not self._status_out:
            self.keep_alive = False

    def feed(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self.response_complete:
            return
        self.bytes_in += len(data)
        if self.bytes_in > self._relay.body_bytes_max:
            self.fail(self._too_large())
            return
        self._progress()
        if self._connection is not None:
            self._connection.send_more(self._framed(data), is_complete=False)
            return
        self._pieces.append(data)
        if self.bytes_in > READ_AHEAD_BYTES:
            self._client.hold_reading(True)

    def feed_end(self) -> None:
        """The request's body is complete."""
        if self.is_whole:
            return
        self.is_whole = True
        if self._connection is not None:
            self._connection.send_more(b"0\r\n\r\n" if self._length is None else b"", is_complete=True)
            self._await_first_byte()

    def client_full(self, is_full: bool) -> None:
        """The client takes the response more slowly than it comes, or keeps up again."""
        if self._connection is not None:
            self._connection.hold_reading(is_full)

    def client_gone(self) -> None:
        """The client hung up: nobody is left to answer."""
        if not self.response_complete:
            self.status = self.status or CLIENT_GONE_STATUS
            self._leave()
            self._finish()

    def late(self) -> None:
        """`due_s` has passed, or `end_s`."""
        if self._connection is not None and self._moved(self._connection.spliced_s):
            return
        if not self.is_whole:
            self.fail(RequestTimeout())
            return
        self._relay.count_error(self.service, "timeout")
        now_s = self._relay.now_s()
        is_silent = now_s >= self.due_s  # else the exchange is only long, which says nothing about the service
        # Where the service is held back, it is the client that is slow.
        if is_silent and self._replica is not None and not (self._connection and self._connection.is_held):
            self._replica.failed(now_s)
        which = ("idle" if self.status else "first byte") if is_silent else "total"
        self.fail(Timeout(detail=f"{self.service}: {which} timeout"))

    def _read(self) -> None:
        """What the head says. Raises for what no service should ever see."""
        route = self._target.route
        assert route is not None
        self.route, self.service = route.prefix, route.service
        self.address = self._client.peer
        self.request_id = ids.request_id()
        if self._target.error is not None:
            raise self._target.error()
        asked = self._asked
        self.address = self._relay.addresses.of(self.address, asked.headers)
        is_new = asked.head is None
        head = self._head = asked.head or read_request(asked.headers, has_own_trace=self._relay.is_tracing)
        self._known = head.known
        if (offered := head.known.get(b"x-request-id")) is not None:
            self.request_id = ids.accepted_request_id(offered.decode("latin-1"))
        if self._relay.is_tracing:
            self._relay.trace_begin(self, head)
        if is_new:
            self._length = head.length
            self.is_whole = self.is_whole or not (head.is_chunked or head.length)
            self._check(route, head)

    def _check(self, route: Route, head: RequestHead) -> None:
        """Refuse what no service should ever see."""
        if self._asked.version not in ("1.1", "1.0"):
            raise InvalidRequest("This server speaks HTTP/1.1.", code="invalid_version")
        if not HOST.fullmatch(head.known.get(b"host", b"none" if self._is_http_10 else b"")):
            raise InvalidRequest("The header Host is missing or names no host.", code="invalid_host")
        if head.is_chunked and self._is_http_10:
            raise InvalidRequest("HTTP/1.0 has no transfer encodings.", code="invalid_framing")
        if self.method not in route.methods:
            if self.method == "OPTIONS" and (lines := self._relay.cors.preflight(head.known)):
                self._answer(204, lines, b"")
                return
            raise MethodNotAllowed(headers={"allow": ", ".join(sorted(route.methods))})
        if (head.length or 0) > self._relay.body_bytes_max:
            raise self._too_large()
        self._asked.head = head
        self._asked.opening = b"%b %b HTTP/1.1\r\nhost: " % (self.method.encode(), self._target.raw)

    # The service's side

    def _send(self, connection: UpstreamConnection) -> None:
        assert self._replica is not None
        head, body = self._head, b"".join(self._pieces)
        self._pieces = []
        framing = b""
        if self.is_whole:
            if body or self._length is not None or self.method in BODY_METHODS:
                framing = b"content-length: %d\r\n" % len(body)
            self.due_s = self._relay.now_s() + self._relay.timeouts.first_byte_s
        elif self._length is not None:
            framing = b"content-length: %d\r\n" % self._length
        else:
            framing = b"transfer-encoding: chunked\r\n"
            body = self._framed(body)
        own = self._relay.own_lines(self, head)
        parts = (self._asked.opening, self._replica.pool.authority, b"\r\n", head.lines, own, framing, b"\r\n", body)
        self._connection = connection
        connection.send(self, b"".join(parts), is_complete=self.is_whole)
        if not self.is_whole:
            if self._known.get(b"expect", b"").lower() == b"100-continue" and not self.bytes_in:
                self._client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._client.hold_reading(False)

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._length is None and data else data

    def upstream_full(self, is_full: bool) -> None:
        self._client.hold_reading(is_full)

    def head(self, status: int, headers: RawHeaders, length: int | None) -> None:
        assert self._connection is not None
        self._progress()
        head = read_response(headers)
        self.build = head.build.decode("latin-1")
        is_bodiless = status in BODILESS
        if length is not None and length >= self._relay.gzip_bytes_min and self._compresses(head, status):
            self._gzip = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP_WBITS)
            head.lines.append(b"content-encoding: gzip\r\nvary: accept-encoding\r\n")
            length = None
        elif length is not None and not is_bodiless:
            head.lines.append(b"content-length: %d\r\n" % length)
            self._is_held = length <= WHOLE_BYTES_MAX
        if length is None and not is_bodiless:
            if self._is_http_10:
                self.keep_alive = False
            else:
                self._is_chunked = True
                self._connection.splice(self._client.write)
                head.lines.append(b"transfer-encoding: chunked\r\n")
        if not head.has_policy:
            head.lines.append(NO_STORE)
        self._head_out = self._response_head(status, head.lines)
        self._status_out = status

    def piece(self, data: bytes) -> None:
        self._pieces.append(data)

    def flush(self) -> None:
        if not self._is_held:
            self._progress()
            self._write(is_last=False)

    def end(self) -> None:
        assert self._replica is not None
        self._part()
        self._replica.succeeded()
        self._write(is_last=True)
        self.complete = True
        self._finish()

    def lost(self, reason: str) -> None:
        assert self._replica is not None
        self._part()
        self._replica.failed(self._relay.now_s())
        self._relay.count_error(self.service, "broken")
        self.fail(BadGateway(detail=f"{self.service}: {reason}"))

    # The response

    def fail(self, error: TollgateError) -> None:
        """Answer with an error in the dialect of the path; where a response has begun, break it."""
        if self.response_complete:
            return
        self._leave()
        if error.detail:
            self._relay.warn(self, error)
        if self.status:
            self._finish(is_broken=True)
            return
        status, headers, body = errors.render(error, path=self.path, request_id=self.request_id)
        lines = [f"{k}: {v}\r\n".encode("latin-1", "replace") for k, v in headers.items() if k != "x-request-id"]
        self._answer(status, [*lines, NO_STORE], body)

    def _answer(self, status: int, lines: list[bytes], body: bytes) -> None:
        """A response of our own."""
        self.status, self.bytes_out = status, len(body)
        if status not in BODILESS:
            lines.append(b"content-length: %d\r\n" % len(body))
        self._client.write(self._response_head(status, lines) + (b"" if self.method == "HEAD" else body))
        self.complete = True
        self._finish()

    def _response_head(self, status: int, lines: list[bytes]) -> bytes:
        if not self.is_whole:
            self.keep_alive = False  # what is left of the body would be taken for a request
        own = [self._client.opening(status), f"x-request-id: {self.request_id}\r\n".encode(), self._limit_headers]
        if (origin := self._known.get(b"origin")) is not None:
            own += self._relay.cors.lines(origin)
        if not self.keep_alive:
            own.append(b"connection: close\r\n")
        return b"".join([*own, *lines, b"\r\n"])

    def _compresses(self, head: ResponseHead, status: int) -> bool:
        accepted = self._known.get(b"accept-encoding", b"").lower()
        return status == 200 and head.is_compressible and not self._is_http_10 and b"gzip" in accepted

    def _write(self, *, is_last: bool) -> None:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        if self._gzip is not None:
            data = self._gzip.compress(data) + (self._gzip.flush() if is_last else b"")
        self.bytes_out += len(data)
        if self._is_chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if is_last:
                data += b"0\r\n\r\n"
        if self._head_out:
            data, self._head_out = self._head_out + data, b""
            self.status = self._status_out
        if data:
            self._client.write(data)

    def _progress(self) -> None:
        self.due_s = self._relay.now_s() + self._relay.timeouts.idle_s

    def _moved(self, at_s: float) -> bool:
        """Whether what moved then, unseen, leaves time."""
        self.due_s = max(self.due_s, at_s + self._relay.timeouts.idle_s)
        return self._relay.now_s() < min(self.due_s, self.end_s)

    def _await_first_byte(self) -> None:
        if not self.status:
            self.due_s = self._relay.now_s() + self._relay.timeouts.first_byte_s

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is larger than {self._relay.body_bytes_max} bytes.")

    def _leave(self) -> None:
        """Stop what runs for this request."""
        self._stop_admitting()
        if self._connection is not None:
            self._connection.abandon()
            self._part()
        if self._replica is not None:
            self._replica.forgotten()

    def _part(self) -> None:
        """From the connection to the service."""
        assert self._connection is not None
        if self._is_chunked:
            self.bytes_out += self._connection.spliced_bytes
        self._connection = None

    def _finish(self, *, is_broken: bool = False) -> None:
        self.response_complete = True
        self._relay.ended(self, self._lease)
        self._client.answered(self, is_broken=is_broken)
