"""POST /chat/message: one message, one answer, in words of its own; errors are problem+json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from services.chat.domain.choice import Choice
from services.chat.domain.request import ChatRequest, Message
from services.chat.routes.bodies import MODEL_CHARS_MAX, Body, read
from services.chat.routes.desk import Desk
from services.chat.routes.documents import answers, asks
from services.chat.service.events import Delta, Finished, Settled, Started
from services.chat.service.library import Draft
from shared.errors import TollgateError
from shared.money import format_credits
from shared.web import Caller

SCOPE = "chat"
PREFIX = "msg_"
MESSAGE_CHARS_MAX = 2_000
LENGTH_MAX = 4_096

_EXAMPLE = {
    "success": True,
    "message": "Tollgate is a self-hosted AI inference platform.",
    "model_used": "chat-mini",
    "credits_charged": "0.0025",
    "remaining_credits": "99.9975",
    "processing_time_ms": 84,
    "interaction_id": "msg_2f6d0f8f0f0e4b1c9a7d5e31",
}


class MessageRequest(Body):
    """One message to a model."""

    message: str = Field(min_length=1, max_length=MESSAGE_CHARS_MAX)
    model: str | None = Field(
        default=None, min_length=1, max_length=MODEL_CHARS_MAX, description="Without one: the first that this key has."
    )
    max_length: int | None = Field(default=None, ge=1, le=LENGTH_MAX, description="The most tokens of the answer.")
    temperature: float | None = Field(default=None, ge=0, le=2)


_DOCUMENT = {
    **asks(MessageRequest, {"message": "What is Tollgate?"}),
    "description": (
        "The short way: one message, one answer, what it cost and what is left. The interaction is kept for as long as "
        "the organisation's retention says. 402 when the wallet is short."
    ),
    "responses": answers("The answer.", _EXAMPLE),
}


def create_router(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/chat", tags=["chat"])

    @router.post("/message", summary="Send one message", **_DOCUMENT)
    async def send_message(request: Request, identity: Caller) -> Response:
        identity.require_scope(SCOPE)
        body = read(await request.body(), MessageRequest)
        asked = ChatRequest(
            model=body.model or desk.service.first_model(identity),
            messages=(Message("user", body.message),),
            max_tokens=body.max_length,
            sampling={} if body.temperature is None else {"temperature": body.temperature},
        )

        def draft(id_: str) -> Draft:
            return Draft(id_, "message", asked.model, [m.wire() for m in asked.messages], {})

        def shape(id_: str, _created: int) -> MessageShape:
            return MessageShape(id_, asked.model)

        return await desk.answer(request, identity, asked, prefix=PREFIX, shape=shape, draft=draft)

    return router


@dataclass(slots=True)
class MessageShape:
    """The answer as one document; it is never a stream."""

    id: str
    model: str
    began_s: float = field(default_factory=time.perf_counter)

    def start(self, event: Started) -> bytes:
        return b""

    def delta(self, event: Delta) -> bytes:
        return b""

    def finish(self, event: Finished) -> bytes:
        return b""

    def end(self, event: Settled) -> bytes:
        return b""

    def error(self, error: TollgateError) -> bytes:
        return b""

    def document(self, choices: Sequence[Choice], event: Settled) -> bytes:
        return orjson.dumps(self.wire(choices, event))

    def wire(self, choices: Sequence[Choice], event: Settled) -> dict[str, Any]:
        bill = event.receipt
        return {
            "success": True,
            "message": choices[0].message["content"],
            "model_used": self.model,
            "credits_charged": None if bill.settled_nano is None else format_credits(bill.settled_nano),
            "remaining_credits": None if bill.available_nano is None else format_credits(bill.available_nano),
            "processing_time_ms": round((time.perf_counter() - self.began_s) * 1000),
            "interaction_id": self.id,
        }
