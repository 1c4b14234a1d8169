"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.chat.domain import ChatRequest
from services.chat.routes import documents
from services.chat.routes.connection import while_connected
from services.chat.routes.frames import DONE, Envelope, error_event
from services.chat.routes.schemas import parse
from services.chat.service import ChatService, Delta, Ended, Event, Settled, Started
from shared.clock import Clock
from shared.errors import TollgateError
from shared.identity import Identity
from shared.telemetry import get_logger
from shared.web import Caller

log = get_logger(__name__)

SCOPE = "chat"


def create_router(service: ChatService, clock: Clock) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post("/chat/completions", summary="Create a chat completion", **documents.COMPLETION)
    async def create_chat_completion(request: Request, identity: Caller) -> Response:
        identity.require_scope(SCOPE)
        asked = parse(await request.body(), service.limits)
        return _Answer(service, asked, identity, created=int(clock.now().timestamp()))

    return router


class _Answer(Response):
    """The ASGI application that generates and sends one completion, as long as its client is there.

    The status line waits for the engine's first chunk, so that whatever fails before it has its proper status.
    """

    def __init__(self, service: ChatService, request: ChatRequest, caller: Identity, *, created: int) -> None:
        super().__init__()
        self._service = service
        self._request = request
        self._caller = caller
        self._envelope = Envelope(request.model, created, include_usage=request.include_usage)
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._stream(send) if self._request.stream else self._whole(send))
        except TimeoutError:
            log.info("client_stalled")  # the server closes what was begun and not finished

    def _events(self) -> aclosing[AsyncGenerator[Event, None]]:
        return aclosing(self._service.complete(self._request, self._caller))

    async def _stream(self, send: Send) -> None:
        envelope = self._envelope
        reason: str | None = None
        try:
            async with self._events() as events:
                async for event in events:
                    match event:
                        case Delta():
                            fields = {k: v for k, v in event.fields.items() if k != "role" and v is not None}
                            if fields:
                                await self._send(send, envelope.chunk(fields))
                        case Started():
                            envelope.build = event.build
                            await self._begin(send, "text/event-stream; charset=utf-8")
                            await self._send(send, envelope.chunk({"role": "assistant", "content": ""}))
                        case Ended() if envelope.include_usage:
                            await self._send(send, envelope.chunk({}, event.reason))
                        case Ended():
                            reason = event.reason  # goes out with the receipt
                        case Settled():
                            last = envelope.usage_chunk(event) if reason is None else envelope.chunk({}, reason, event)
                            await self._send(send, last + DONE)
        except TollgateError as e:
            if not self._has_begun:
                raise
            log.warning("stream_failed", code=e.code, detail=e.detail)
            await self._send(send, error_event(e))
        await self._send(send, b"", more=False)

    async def _whole(self, send: Send) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        reason = ""
        async with self._events() as events:
            async for event in events:
                match event:
                    case Delta():
                        _append(message, event.fields)
                    case Started():
                        self._envelope.build = event.build
                    case Ended():
                        reason = event.reason
                    case Settled():
                        body = self._envelope.completion({**message, "refusal": None}, reason, event)
        await self._begin(send, "application/json", len(body))
        await self._send(send, body, more=False)

    async def _begin(self, send: Send, media_type: str, length: int | None = None) -> None:
        headers = [
            (b"content-type", media_type.encode()),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Raises TimeoutError for a client that does not read."""
        async with asyncio.timeout(self._service.limits.send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


def _append(message: dict[str, Any], fields: Any) -> None:
    """Join the texts of deltas: `content`, and `reasoning_content` of engines that tell them apart."""
    for name, value in fields.items():
        if isinstance(value, str) and name != "role":
            message[name] = message.get(name, "") + value
