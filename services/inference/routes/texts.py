"""POST /v1/embeddings in OpenAI's shape, and POST /v1/rerank in the one that Jina and Cohere made common."""

from __future__ import annotations

import base64
import math
import struct
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from services.inference.texts import Answer, Receipt, Texts
from shared.errors import InvalidRequest
from shared.ids import uuid7
from shared.money import format_credits
from shared.web import Caller

SCOPE = "inference"
MODEL_CHARS_MAX = 256

ModelName = Annotated[str, Field(min_length=1, max_length=MODEL_CHARS_MAX, description="A model's alias.")]


class EmbeddingBody(BaseModel):
    """OpenAI's request. Texts only: token numbers belong to one vocabulary, and that is rarely this model's."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: ModelName
    input: str | list[str] | list[int] | list[list[int]] = Field(description="One text, or several.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        default=None, ge=1, description="Keep only so many numbers of a vector, scaled to length 1 again."
    )
    user: str | None = Field(default=None, description="Accepted and ignored.")


class RerankBody(BaseModel):
    """A query, and the documents to order by it."""

    model_config = ConfigDict(extra="ignore")

    model: ModelName
    query: str = Field(min_length=1)
    documents: list[str | dict[str, Any]] = Field(min_length=1, description='Texts, or objects with a "text".')
    top_n: int | None = Field(default=None, ge=1, description="Return only the best so many.")
    return_documents: bool = False


class EmbeddingView(BaseModel):
    """`embedding` is a list of numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class TokensView(BaseModel):
    prompt_tokens: int
    total_tokens: int


class ReceiptView(BaseModel):
    """Decimal credits. `settled` is null while the ledger is away: it settles later."""

    held: str
    settled: str | None
    build: str
    hold_id: str


class EmbeddingsView(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingView]
    model: str
    usage: TokensView
    tollgate: ReceiptView


class DocumentView(BaseModel):
    text: str


class RankView(BaseModel):
    """`index` is the document's place in the request."""

    index: int
    relevance_score: float
    document: DocumentView | None = None


class RerankView(BaseModel):
    """`results` with the best first."""

    id: str
    model: str
    results: list[RankView]
    usage: TokensView
    tollgate: ReceiptView


def router(texts: Texts) -> APIRouter:
    """Routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["embeddings"])

    @routes.post("/embeddings", summary="Embed texts")
    async def embeddings(identity: Caller, body: EmbeddingBody) -> EmbeddingsView:
        identity.require_scope(SCOPE)
        inputs = _checked(texts, [body.input] if isinstance(body.input, str) else body.input, "input")
        answer = await texts.embed(body.model, inputs, identity)
        return EmbeddingsView(
            data=[EmbeddingView(index=i, embedding=_wire(vector, body)) for i, vector in enumerate(answer.data)],
            model=body.model,
            usage=_usage(answer),
            tollgate=_receipt(answer.receipt),
        )

    @routes.post("/rerank", summary="Order documents by a query", response_model_exclude_none=True)
    async def rerank(identity: Caller, body: RerankBody) -> RerankView:
        identity.require_scope(SCOPE)
        plain = [d.get("text") if isinstance(d, dict) else d for d in body.documents]
        documents = _checked(texts, plain, "documents")
        answer = await texts.rerank(body.model, body.query, documents, identity)
        ranked = sorted(range(len(documents)), key=lambda index: -answer.data[index])[: body.top_n]
        results = [
            RankView(
                index=index,
                relevance_score=answer.data[index],
                document=DocumentView(text=documents[index]) if body.return_documents else None,
            )
            for index in ranked
        ]
        return RerankView(
            id=f"rerank-{uuid7().hex}",
            model=body.model,
            results=results,
            usage=_usage(answer),
            tollgate=_receipt(answer.receipt),
        )

    return routes


def _checked(texts: Texts, values: list[Any], param: str) -> list[str]:
    """The texts of a request. Raises InvalidRequest."""
    limits = texts.limits
    if not all(isinstance(value, str) for value in values):
        raise InvalidRequest(
            f"'{param}' must hold texts; token numbers are not served.", code="invalid_type", param=param
        )
    if not values or not all(values):
        raise InvalidRequest(f"'{param}' must hold non-empty texts.", code="invalid_value", param=param)
    if len(values) > limits.texts_max:
        raise InvalidRequest(
            f"'{param}' holds more than {limits.texts_max} texts.", code="array_above_max_length", param=param
        )
    if sum(map(len, values)) > limits.characters_max:
        raise InvalidRequest(
            f"'{param}' holds more than {limits.characters_max} characters.",
            code="string_above_max_length",
            param=param,
        )
    return values


def _wire(vector: bytes, body: EmbeddingBody) -> list[float] | str:
    numbers = struct.unpack(f"<{len(vector) // 4}f", vector)
    if body.dimensions is not None:
        if body.dimensions > len(numbers):
            raise InvalidRequest(
                f"This model's vectors have {len(numbers)} dimensions.", code="invalid_value", param="dimensions"
            )
        numbers = numbers[: body.dimensions]
        length = math.hypot(*numbers) or 1.0
        numbers = tuple(number / length for number in numbers)
    if body.encoding_format == "float":
        return list(numbers)
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def _usage(answer: Answer) -> TokensView:
    return TokensView(prompt_tokens=answer.tokens, total_tokens=answer.tokens)


def _receipt(receipt: Receipt) -> ReceiptView:
    settled = None if receipt.settled_nano is None else format_credits(receipt.settled_nano)
    return ReceiptView(
        held=format_credits(receipt.held_nano), settled=settled, build=receipt.build, hold_id=receipt.hold_id
    )
