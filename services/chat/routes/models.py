"""GET /v1/models: OpenAI's shape, with the context, the builds and the caller's prices as further fields."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.chat.domain.catalogue import Model
from services.chat.routes import documents
from services.chat.service.completion import ChatService
from services.chat.service.terms import Treasury
from shared.metering import Price
from shared.money import format_credits
from shared.web import Caller

SCOPE = "models"
OWNER = "tollgate"
# What every engine of a kind does, by the contract.
CAPABILITIES = {
    "chat": (
        "chat.completions",
        "completions",
        "responses",
        "streaming",
        "logprobs",
        "json_object",
        "json_schema",
        "tools",
        "tokenize",
    ),
    "embedding": ("embeddings", "rerank"),
    "rerank": ("rerank",),
}


def create_router(service: ChatService, treasury: Treasury) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["models"])

    @router.get("/models", summary="List the models", **documents.MODEL_LIST)
    async def list_models(identity: Caller) -> dict[str, Any]:
        identity.require_scope(SCOPE)
        models, prices = service.models(identity), await treasury.prices(identity)
        return {"object": "list", "data": [_wire(m, prices.get(m.alias)) for m in models]}

    @router.get("/models/{model}", summary="Describe a model", **documents.MODEL)
    async def retrieve_model(model: str, identity: Caller) -> dict[str, Any]:
        identity.require_scope(SCOPE)
        found = service.model(model, identity)
        return _wire(found, (await treasury.prices(identity)).get(model))

    return router


def _wire(model: Model, price: Price | None) -> dict[str, Any]:
    return {
        "id": model.alias,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "kind": model.kind,
        "state": model.state.value,
        "capabilities": list(CAPABILITIES.get(model.kind, ())),
        "description": model.description,
        "context_window": model.context_tokens,
        "prices": None if price is None else _price(price),
        "builds": [
            {
                "name": b.name,
                "state": b.state.value,
                "stable": b.name == model.stable_build,
                "engine": b.engine,
                "quantization": b.quantization,
                "context_window": b.context_tokens,
                "parameters": b.parameters or None,
            }
            for b in model.builds.values()
        ],
    }


def _price(price: Price) -> dict[str, str]:
    """In billing's words: decimal credits per request, and per million tokens of a class."""
    return {
        "per_request": format_credits(price.per_request_nano),
        "input": format_credits(price.input_nano_per_million),
        "cached_input": format_credits(price.cached_input_nano_per_million),
        "output": format_credits(price.output_nano_per_million),
    }
