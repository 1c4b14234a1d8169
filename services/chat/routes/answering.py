"""The ASGI application that sends one completion, as long as its client is there.

The status line waits for the engine's first chunk, so that whatever fails before it has its proper status.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.chat.domain.choice import Choice
from services.chat.routes.connection import SendLimit, while_connected
from services.chat.routes.frames import Shape
from services.chat.service.events import Delta, Event, Finished, Settled, Started
from shared.errors import TollgateError
from shared.telemetry import get_logger

log = get_logger(__name__)

Events = AsyncGenerator[Event, None]


class Answering(Response):
    """Sends `events` in a shape, as a stream or whole; closes them when the client leaves."""

    def __init__(
        self,
        events: Events,
        shape: Shape,
        *,
        stream: bool,
        choices: int,
        send_timeout_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._more_headers = dict(headers)
        self._source = events
        self._shape = shape
        self._is_stream = stream
        self._choices = [Choice() for _ in range(choices)]
        self._send_timeout_s = send_timeout_s
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with SendLimit(send, self._send_timeout_s) as sending:
                await while_connected(receive, self._stream(sending) if self._is_stream else self._whole(sending))
        except TimeoutError:
            log.info("client_stalled")  # the server closes what was begun and not finished

    async def _stream(self, send: Send) -> None:
        try:
            async with aclosing(self._source) as events:
                async for event in events:
                    if isinstance(event, Started):
                        await self._begin(send, "text/event-stream; charset=utf-8", event.headers)
                    if content := self._chunk(event):
                        await self._send(send, content)
        except TollgateError as e:
            if not self._has_begun:
                raise
            log.warning("stream_failed", code=e.code, detail=e.detail)
            await self._send(send, self._shape.error(e))
        await self._send(send, b"", more=False)

    def _chunk(self, event: Event) -> bytes:
        match event:
            case Delta():
                return self._shape.delta(event)
            case Started():
                return self._shape.start(event)
            case Finished():
                return self._shape.finish(event)
            case Settled():
                return self._shape.end(event)

    async def _whole(self, send: Send) -> None:
        headers: Mapping[str, str] = {}
        body = b""
        async with aclosing(self._source) as events:
            async for event in events:
                match event:
                    case Delta():
                        self._choices[event.index].add(event.fields, event.logprobs)
                    case Started():
                        headers = event.headers
                        self._shape.start(event)
                    case Finished():
                        self._choices[event.index].finish(event.reason)
                    case Settled():
                        body = self._shape.document(self._choices, event)
        await self._begin(send, "application/json", headers, len(body))
        await self._send(send, body, more=False)

    async def _begin(self, send: Send, media_type: str, more: Mapping[str, str], length: int | None = None) -> None:
        headers = [
            (b"content-type", media_type.encode()),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in (self._more_headers | dict(more)).items()),
        ]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})
