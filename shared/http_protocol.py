"""uvicorn's HTTP/1.1 protocol with limits on what comes before a request is one.

    HEAD ──complete──► BODY / RESPONSE ──done──► IDLE ──first byte──► HEAD
     │ more than HEAD_BYTES_MAX: 431, close          │ uvicorn's keep-alive timer
     │ longer than HEAD_TIMEOUT_S: close

uvicorn on httptools limits neither the size nor the time of a head, and httptools joins the fragments of one header
in memory, before any of our code runs: a client could fill memory with a header that never ends, or hold connections
open with one byte each. The same count stops a trailer that never ends: bytes that bring neither a complete head nor a
piece of a body may only be so many. And when a connection is lost, uvicorn tells only the newest of pipelined
requests; here the one that is being answered is told, so that work for nobody stops.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_BYTES_MAX = 64 * 1024
HEAD_TIMEOUT_S = 15.0

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\ncontent-length: 49\r\n"
    b"connection: close\r\n\r\nThe headers are larger than this server accepts.\n"
)


class _HeadTooLarge(Exception):
    """Raised in a parser callback; httptools turns it into a parser error, which ends the connection."""


class GuardedHttpProtocol(HttpToolsProtocol):
    """See the module. Private names of uvicorn that it relies on: `_start_asgi_task`, `pipeline`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self.is_in_head = False
        self._is_refused = False
        self._head_bytes = 0
        self._has_progressed = False
        self._bytes_without_progress = 0
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._has_progressed = False
        super().data_received(data)
        self._bytes_without_progress = 0 if self._has_progressed else self._bytes_without_progress + len(data)
        if self._bytes_without_progress > HEAD_BYTES_MAX and not self._is_refused:
            self._refuse()
        elif self.is_in_head and self._head_timer is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self.begin_head()
        super().on_message_begin()

    def begin_head(self) -> None:
        """A head comes: count it, and time it."""
        self.is_in_head = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self.is_in_head:  # a trailer is no header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.end_head()
        super().on_headers_complete()

    def end_head(self) -> None:
        """The head is complete."""
        self._has_progressed = True
        self.is_in_head = False
        if self._head_timer is not None:
            self._head_done()

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progressed = True
        super().on_message_complete()

    def note_progress(self) -> None:
        """A piece of a body came, or its end."""
        self._has_progressed = True

    def send_400_response(self, msg: str) -> None:
        if self._is_refused:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES_MAX:
            self._is_refused = True
            raise _HeadTooLarge

    def _refuse(self) -> None:
        self._is_refused = True
        self.transport.write(_TOO_LARGE)
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        self.transport.close()

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
