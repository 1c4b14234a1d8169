"""The client's side of the public port: uvicorn's HTTP/1.1 protocol, with relayed paths taken out before ASGI.

    HEAD ──a relayed path──► Relayed ──answered──► HEAD, or hang up
      └────any other───────► uvicorn's cycle, over ASGI: the gateway's own pages

Connections, TLS, keep-alive and its timer, the order of pipelined requests and the drain stay uvicorn's: a `Relayed`
stands where its cycles stand. Pipelined requests wait, up to PIPELINED_MAX of them; what is sent beyond, or is too
large before its turn, is not answered, and the connection closes after the last that is. After an answer that did not
wait for its request's end, LINGER_S of it are read and dropped, so that the answer is not lost to a reset. While the
process drains, idle connections stay for `drain_idle_s`: a request that is on its way is answered, and told to close.
The relay's clock ends with the answer; a client that then takes none of what is left for it is hung up on by the
kernel, after the same idle time: a close would wait for it for ever.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from services.gateway.known import Asked, Cut, cut
from services.gateway.relay import Relay
from services.gateway.relayed import Relayed
from services.gateway.target import Targets
from shared.errors import InvalidRequest
from shared.http_protocol import GuardedHttpProtocol

PIPELINED_MAX = 16
LINGER_S = 1.0


class EdgeProtocol(GuardedHttpProtocol):
    """See the module. Private names of uvicorn that it relies on: those of GuardedHttpProtocol, and `cycle`."""

    def __init__(self, relay: Relay, targets: Targets, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._relay = relay
        self._targets = targets
        self._relayed: Relayed | None = None  # the one that is being answered
        self._arriving: Relayed | None = None  # the one whose body is coming in
        self._is_between = True  # two messages, in what the parser was given
        self._cut: Cut | None = None  # the head at the beginning of what came, which is new
        self._missing = 0  # bytes of the body of a request whose head was known
        self._idle_since_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._is_deaf = False  # nothing that still comes is answered
        self._is_draining = False
        self.peer = ""
        self.write: Callable[[bytes], None]  # the transport's own: a call less for each chunk of a stream

    # asyncio's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.write = transport.write
        self.peer = self.client[0] if self.client else ""
        end = transport.get_extra_info("socket")
        if end is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            end.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(int(self._relay.timeouts.idle_s * 1000), 2**31 - 1)
            )

    def connection_lost(self, exc: Exception | None) -> None:
        relayed, self._relayed, self._arriving = self._relayed, None, None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if isinstance(self.cycle, Relayed):
            self.cycle = None  # type: ignore[assignment]  # as before the first request
        super().connection_lost(exc)
        if relayed is not None:
            relayed.client_gone()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._is_between and not self.pipeline and (self.cycle is None or self.cycle.response_complete):
            self._cut = found = cut(data)
            if found is not None and (asked := self._relay.known_heads.find(found)) is not None:
                length = found.length or 0
                missing = found.body_at + length - len(data)
                if missing >= 0 and length <= self._relay.body_bytes_max:
                    self._answer_known(asked, found.length, data[found.body_at :], missing)
                    return
        elif self._missing:
            data = self._take_body(data)
            if not data:
                return
        super().data_received(data)
        self._cut = None

    def _answer_known(self, asked: Asked, length: int | None, body: bytes, missing: int) -> None:
        """A request whose head is known, and of its body so many bytes are to come."""
        if self._head_timer is not None:
            self._head_done()
        relayed = Relayed(self._relay, self, asked, length, None if missing else body)
        self.cycle = relayed  # type: ignore[assignment]
        if missing:
            self._is_between, self._missing, self._arriving = False, missing, relayed
        self._begin(relayed)
        if missing and body:
            relayed.feed(body)

    def _take_body(self, data: bytes) -> bytes:
        """The body of such a request, as far as it is there; what is left, for llhttp."""
        body, rest = data[: self._missing], data[self._missing :]
        self._missing -= len(body)
        if self._arriving is not None:
            self._arriving.feed(body)
        if not self._missing:
            self.on_message_complete()
        return rest

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._relayed is not None:
            self._relayed.client_full(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._relayed is not None:
            self._relayed.client_full(False)

    # httptools' side

    def on_message_begin(self) -> None:
        self._is_between = False
        self.begin_head()
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        # What a head may hold is counted once it is complete; one that never is, by what comes without progress.
        if self.is_in_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        target = self._targets.find(self.url)
        if target.route is None:
            self._hand_to_uvicorn()
            return
        self.end_head()
        parser, version = self.parser, self.parser.get_http_version()
        keep_alive = version == "1.1" and parser.should_keep_alive() and not parser.should_upgrade()
        asked = Asked(parser.get_method().decode("ascii"), target, self.headers, version, keep_alive, self._cut)
        self._cut = None
        relayed = Relayed(self._relay, self, asked)
        waits_for, self.cycle = self.cycle, relayed  # type: ignore[assignment]
        self._arriving = relayed
        if waits_for is None or waits_for.response_complete:
            self._begin(relayed)
        else:
            self._queue(relayed)

    def on_body(self, body: bytes) -> None:
        if self._arriving is None:
            if not self._is_deaf:
                super().on_body(body)
            return
        self.note_progress()
        if self._arriving is not self._relayed and self._arriving.bytes_in + len(body) > self._relay.body_bytes_max:
            self.pipeline.popleft()  # its refusal would be taken for the answer that another request waits for
            self._hear_no_more()
            return
        self._arriving.feed(body)

    def on_message_complete(self) -> None:
        self.note_progress()
        self._is_between = True
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            arriving.feed_end()
        elif not self._is_deaf:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. Nothing is written into, or after, the answer to what came before it."""
        if self._is_deaf:
            return
        self._is_deaf = True
        if self._arriving is not None and self._arriving is self._relayed:
            self._arriving.fail(InvalidRequest("The body is not framed as its head says.", code="invalid_framing"))
        elif self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            if self._relayed is not None:
                self._relayed.keep_alive = False
        else:
            super().send_400_response(msg)

    # The relay's side: a Client

    def opening(self, status: int) -> bytes:
        return self._relay.opening(status, self.server_state.default_headers)

    def hold_reading(self, is_held: bool) -> None:
        if is_held:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def answered(self, exchange: Relayed, *, is_broken: bool) -> None:
        self._relayed = None
        if self.transport is None or self.transport.is_closing():
            return
        if is_broken:
            self._is_deaf = True
            self.pipeline.clear()
            self.transport.close()
        elif exchange.keep_alive and not (self._is_deaf and not self.pipeline):
            self._go_on()
        elif exchange.is_whole:
            self._is_deaf = True
            self.transport.close()
        else:
            self._linger()

    def _go_on(self) -> None:
        """With the next request. As uvicorn's `on_response_complete`, but for a timer that is left to run: it looks
        then how long the connection has idled."""
        if self.pipeline:
            self.on_response_complete()
            return
        self.flow.resume_reading()
        self._idle_since_s = self.loop.time()
        if self._is_draining:  # its head had left before: the next request is on its way perhaps
            self._close_soon()
        elif self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_idle)

    def _look_idle(self) -> None:
        self._idle_timer = None
        if self.transport.is_closing() or not self._is_between or not self.cycle.response_complete:
            return  # the end of what runs looks again
        rest_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if rest_s > 0:
            self._idle_timer = self.loop.call_later(rest_s, self._look_idle)
        else:
            self.transport.close()

    # uvicorn's side

    def shutdown(self) -> None:
        self._is_draining = True
        if self.cycle is None or self.cycle.response_complete:
            self._close_soon()
        elif isinstance(self.cycle, Relayed):
            self.cycle.tell_to_close()
        else:
            super().shutdown()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Relayed):
            self._begin(cycle)
        else:
            super()._start_asgi_task(cycle, app)

    def _begin(self, relayed: Relayed) -> None:
        if self._is_draining:
            relayed.keep_alive = False
        self._relayed = relayed
        self._unset_keepalive_if_required()
        relayed.start()

    def _queue(self, relayed: Relayed) -> None:
        if len(self.pipeline) < PIPELINED_MAX:
            self.pipeline.appendleft((relayed, self.app))  # type: ignore[arg-type]
            return
        self._hear_no_more()

    def _hear_no_more(self) -> None:
        """Not of what arrives, nor of what comes after it; what waits before it is answered."""
        self._is_deaf = True
        self._arriving = None
        self.flow.pause_reading()

    def _hand_to_uvicorn(self) -> None:
        """Let uvicorn make its scope of what we have gathered."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()
        if self._is_draining:
            self.cycle.keep_alive = False

    def _linger(self) -> None:
        self._is_deaf = True
        self.pipeline.clear()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _close_soon(self) -> None:
        self.loop.call_later(self._relay.timeouts.drain_idle_s, self._close_idle)

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
