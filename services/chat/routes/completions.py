"""POST /v1/chat/completions, and what a prompt would cost: POST /v1/tokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from services.chat.routes import documents
from services.chat.routes.answering import Answering
from services.chat.routes.frames import ChatShape, new_id
from services.chat.routes.schemas import parse
from services.chat.service.completion import ChatService
from shared.clock import Clock
from shared.web import Caller

SCOPE = "chat"


def create_router(service: ChatService, clock: Clock) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post("/chat/completions", summary="Create a chat completion", **documents.COMPLETION)
    async def create_chat_completion(request: Request, identity: Caller) -> Response:
        identity.require_scope(SCOPE)
        asked = parse(await request.body(), service.limits)
        shape = ChatShape(
            id=new_id("chatcmpl"),
            created=int(clock.now().timestamp()),
            model=asked.model,
            choices=asked.n,
            include_usage=asked.include_usage,
            metadata=asked.metadata or None,
        )
        return Answering(
            service.complete(asked, identity),
            shape,
            stream=asked.stream,
            choices=asked.n,
            send_timeout_s=service.limits.send_timeout_s,
        )

    return router
