"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from services.chat.routes import documents
from services.chat.routes.bodies import read
from services.chat.routes.desk import Desk
from services.chat.routes.frames import ChatShape
from services.chat.routes.schemas import ChatCompletionBody, as_request
from services.chat.service.library import Draft
from shared.web import Caller

SCOPE = "chat"
PREFIX = "chatcmpl-"


def create_router(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post("/chat/completions", summary="Create a chat completion", **documents.COMPLETION)
    async def create_chat_completion(request: Request, identity: Caller) -> Response:
        identity.require_scope(SCOPE)
        body = read(await request.body(), ChatCompletionBody)
        asked = as_request(body, desk.service.limits)

        def shape(id_: str, created: int) -> ChatShape:
            return ChatShape(
                id=id_,
                created=created,
                model=asked.model,
                choices=asked.n,
                include_usage=asked.include_usage,
                top_logprobs=body.top_logprobs or 0,
                metadata=asked.metadata or None,
            )

        def draft(id_: str) -> Draft:
            messages = [m.wire() for m in asked.messages]
            return Draft(id_, "completion", asked.model, messages, asked.metadata, asked.n)

        return await desk.answer(
            request, identity, asked, prefix=PREFIX, shape=shape, draft=draft if asked.store else None
        )

    return router
