"""POST /v1/tokenize: how long a prompt is and what it would cost, before anything is paid."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request

from services.chat.domain.request import ChatRequest
from services.chat.routes import documents
from services.chat.routes.schemas import ChatCompletionBody, parse
from services.chat.routes.text_completions import CompletionBody
from services.chat.routes.text_completions import parse as parse_text
from services.chat.service.completion import ChatService
from services.chat.service.terms import Treasury
from shared.metering import Price
from shared.money import format_credits
from shared.web import Caller

SCOPE = "chat"
MILLION = 10**6


def create_router(service: ChatService, treasury: Treasury) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post(
        "/tokenize", summary="Count a prompt's tokens", **documents.tokenize(ChatCompletionBody, CompletionBody)
    )
    async def tokenize(request: Request, identity: Caller) -> dict[str, Any]:
        identity.require_scope(SCOPE)
        asked = _parse(await request.body(), service)
        count, build = await service.count(asked, identity)
        price = (await treasury.prices(identity)).get(asked.model)
        return {
            "object": "tokenization",
            "model": asked.model,
            "count": count,
            "max_model_len": build.context_tokens,
            "cost": None if price is None else _cost(price, asked, count),
        }

    return router


def _parse(content: bytes, service: ChatService) -> ChatRequest:
    """A chat's body, or with `prompt` that of a plain completion."""
    try:
        is_text = "prompt" in orjson.loads(content)
    except (ValueError, TypeError):
        is_text = False
    return parse_text(content, service.limits)[0] if is_text else parse(content, service.limits)


def _cost(price: Price, asked: ChatRequest, count: int) -> dict[str, str]:
    """Decimal credits: of the prompt alone, and of each further thousand tokens of the answer."""
    prompt = price.per_request_nano - (-asked.n * count * price.input_nano_per_million // MILLION)
    thousand = -(-1_000 * price.output_nano_per_million // MILLION)
    return {"prompt": format_credits(prompt), "per_thousand_output_tokens": format_credits(thousand)}
