"""Connections to one replica of a service, kept for the next request: asyncio and httptools, nothing between.

    OPENING ──connected──► IDLE ──send──► BUSY ──response and request complete──► IDLE
       │ refused, late       │ hung up, old, spoke unasked     │ broke, garbage, head too large, left early
       └──────────► CLOSED ◄─┴─────────────────────────────────┘

One request at a time on each. The bytes of a response go to its `Receiver` as they come, after each read one `flush`.
The chunks of a response may be spliced, past llhttp and the receiver:

    PARSED ──a chunk is complete, and nothing after it──► BETWEEN CHUNKS ──a read is one whole chunk──► written as it is
      ▲                                                    │    ▲                                        │
      └────────────────────anything else───────────────────┘    └────────────────────────────────────────┘

One whole chunk means: byte for byte as we would frame these bytes, so that what is copied is what we would write. For
llhttp nothing has happened meanwhile: it stands between two chunks, before and after.

A connection is used again only when both messages have ended where their framing says and nothing followed: what
follows can never become the answer to somebody else. A response without a length ends when the service hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools

from services.gateway.heads import RawHeaders

HEAD_BYTES_MAX = 64 * 1024  # of a response; also what a trailer may hold
SWITCHING_PROTOCOLS = 101
STATUS_MIN, STATUS_MAX = 200, 599
CRLF = b"\r\n"
CHUNK_DIGITS_MAX = 8
NEVER_S = float("-inf")


class Receiver(Protocol):
    """Whom a response goes to. After `end` or `lost` nothing more comes."""

    def head(self, status: int, headers: RawHeaders, length: int | None) -> None:
        """The head, names in lower case; `length` is None for a body whose end only its framing or the connection's
        end shows."""

    def piece(self, data: bytes) -> None:
        """A piece of the body."""

    def flush(self) -> None:
        """What was read is given: pass it on."""

    def end(self) -> None:
        """The response is complete; `flush` does not come."""

    def lost(self, reason: str) -> None:
        """The response will never be complete."""

    def upstream_full(self, is_full: bool) -> None:
        """The service takes the request's body more slowly than it comes, or keeps up again."""


@lru_cache(maxsize=4_096)
def chunk_opening(length: int) -> bytes:
    """How a chunk of so many bytes in all begins, in the one way in which we write it, that is in lower case, without
    leading zeros and extensions; b"" where none is so long, or only the last, empty one."""
    for digits in range(1, CHUNK_DIGITS_MAX):
        opening = b"%x\r\n" % max(0, length - digits - 2 * len(CRLF))
        if len(opening) == digits + len(CRLF) and opening[:1] != b"0":
            return opening
    return b""


class _Unusable(Exception):
    """Raised in a parser callback; httptools turns it into a parser error."""


class UpstreamConnection(asyncio.Protocol):
    """See the module."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser: Any = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._headers: RawHeaders = []
        self._is_interim = self._has_head = self._has_ended = self._until_close = self._is_request_complete = False
        self._is_last = self._is_between_chunks = False
        self._unparsed = 0
        self._splice_to: Callable[[bytes], None] | None = None
        self._splice: Callable[[bytes], None] | None = None  # the same while the next read may be one chunk
        self.spliced_bytes = 0  # of the body
        self.spliced_s = NEVER_S  # when last, by the loop's clock
        self.is_held = False  # the client takes the response more slowly than it comes
        self.is_reusable = True
        self.idle_since_s = 0.0
        self.loop_time_s = asyncio.get_running_loop().time
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # comes with connection_made

    def send(self, receiver: Receiver, data: bytes, *, is_complete: bool, is_last: bool = False) -> None:
        """Begin a request: its head, and its body as far as it is there. `is_last`: it asked to close afterwards."""
        self._receiver = receiver
        self._is_last = is_last
        self._has_head = self._has_ended = self._until_close = False
        self._is_request_complete = is_complete
        self._unparsed = 0
        self._splice_to = None
        self.spliced_bytes, self.spliced_s = 0, NEVER_S
        self.transport.write(data)

    def splice(self, write: Callable[[bytes], None]) -> None:
        """Whole chunks of this response may go straight there; all else comes to the receiver, in order."""
        self._splice_to = write

    def send_more(self, data: bytes, *, is_complete: bool) -> None:
        """More of the request's body, framed."""
        self._is_request_complete = is_complete
        if data:
            self.transport.write(data)

    def hold_reading(self, is_held: bool) -> None:
        """Read no more for now, or again."""
        if is_held != self.is_held:
            self.is_held = is_held
            self.transport.pause_reading() if is_held else self.transport.resume_reading()

    def abandon(self) -> None:
        """Hang up at once: nobody waits for the response any more."""
        self._receiver = self._splice = None
        self._close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        if (splice := self._splice) is not None:
            opening = chunk_opening(len(data))
            if opening and data.startswith(opening) and data.endswith(CRLF):
                splice(data)
                self.spliced_bytes += len(data) - len(opening) - len(CRLF)
                self.spliced_s = self.loop_time_s()
                return
            self._splice = None
        if self._receiver is None:
            self._close()
            return
        self._unparsed += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._lose("garbage")
            return
        receiver = self._receiver
        if self._has_ended:
            self._end()
        elif self._unparsed > HEAD_BYTES_MAX:
            self._lose("head too large")
        elif receiver is not None and self._has_head:
            receiver.flush()
            if self._is_between_chunks and data.endswith(CRLF):
                self._splice = self._splice_to

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if self._receiver is not None:
            if exc is None and self._has_head and self._until_close:
                self._end()
            else:
                self._lose("hung up")
        self._pool.closed(self)

    def pause_writing(self) -> None:
        if self._receiver is not None:
            self._receiver.upstream_full(True)

    def resume_writing(self) -> None:
        if self._receiver is not None:
            self._receiver.upstream_full(False)

    def on_message_begin(self) -> None:
        if self._has_ended:
            raise _Unusable  # a second answer to one question
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        status = self._parser.get_status_code()
        if status < STATUS_MIN:
            if status == SWITCHING_PROTOCOLS:
                raise _Unusable
            self._is_interim = True
            return
        if status > STATUS_MAX:
            raise _Unusable
        self._has_head = True
        framing = dict(self._headers)
        length = int(framing[b"content-length"]) if b"content-length" in framing else None
        self._until_close = length is None and b"transfer-encoding" not in framing
        self.is_reusable = self._parser.should_keep_alive()
        assert self._receiver is not None
        self._receiver.head(status, self._headers, length)

    def on_body(self, data: bytes) -> None:
        self._unparsed = 0
        if self._receiver is not None:
            self._receiver.piece(data)

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._is_between_chunks = False
        if self._is_interim:
            self._is_interim = False
        else:
            self._has_ended = True

    def _end(self) -> None:
        receiver, self._receiver, self._splice = self._receiver, None, None
        if self.is_reusable and self._is_request_complete and not self._is_last and not self.transport.is_closing():
            self.hold_reading(False)
            self._pool.give_back(self)
        else:
            self._close()
        if receiver is not None:
            receiver.end()

    def _lose(self, reason: str) -> None:
        receiver, self._receiver, self._splice = self._receiver, None, None
        self._close()
        if receiver is not None:
            receiver.lost(reason)

    def _close(self) -> None:
        self.is_reusable = False
        self.transport.abort()


class Pool:
    """The connections to one address: at most `connections_max`, each idle for `idle_max_s` at most.

    `on_room` is called whenever one became free or went away.
    """

    def __init__(self, url: str, *, connections_max: int, idle_max_s: float, on_room: Callable[[], None]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"{url!r} is not http(s)://host:port")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname, parts.port or (443 if self._tls else 80))
        self.authority = parts.netloc.rpartition("@")[2].encode()
        self._connections_max = connections_max
        self._idle_max_s = idle_max_s
        self._on_room = on_room
        self._idle: deque[UpstreamConnection] = deque()
        self._open: set[UpstreamConnection] = set()
        self._opening = 0
        self._is_retired = False

    @property
    def outstanding(self) -> int:
        """Requests that are being answered, and connections being opened for one."""
        return len(self._open) - len(self._idle) + self._opening

    @property
    def is_full(self) -> bool:
        return not self._idle and len(self._open) + self._opening >= self._connections_max

    def take(self) -> UpstreamConnection | None:
        """A connection that waits for a request: the one that waited least."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def open(self, timeout_s: float) -> UpstreamConnection:
        """A new connection. Raises OSError, TimeoutError."""
        loop = asyncio.get_running_loop()
        self._opening += 1
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), *self._address, ssl=self._tls
                )
        finally:
            self._opening -= 1
        return connection

    def opened(self, connection: UpstreamConnection) -> None:
        """A connection stands."""
        self._open.add(connection)

    def give_back(self, connection: UpstreamConnection) -> None:
        """A connection is free for another request."""
        if self._is_retired:
            connection.abandon()
            return
        connection.idle_since_s = connection.loop_time_s()
        self._idle.append(connection)
        self._on_room()

    def closed(self, connection: UpstreamConnection) -> None:
        """A connection is gone."""
        self._open.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        self._on_room()

    def close_idle(self, now_s: float) -> None:
        """Hang up on those that waited too long: the longest waiting stand first."""
        while self._idle and self._idle[0].idle_since_s <= now_s - self._idle_max_s:
            self._idle.popleft().abandon()

    def retire(self) -> None:
        """No new requests; what runs goes on to its end."""
        self._is_retired = True
        while self._idle:
            self._idle.popleft().abandon()
