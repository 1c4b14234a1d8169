"""Embeddings and reranking: choose the build, hold the credits, compute, settle what the engine counted."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.inference.domain import Build, BuildState, Model
from services.inference.errors import BuildRefused, TritonError
from services.inference.service import Models
from services.inference.triton import TritonServer
from shared.errors import BadGateway, InvalidRequest, NotFound, Timeout, TollgateError, Unavailable
from shared.flags import Flags
from shared.identity import Identity
from shared.metering import Metering, Usage

FRAME_TOKENS = 8  # what an engine puts around a text, or between a query and a document
PRIORITY = 2
FINISHED = "stop"
BUSY_RETRY_S = 1
LOADING_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit of these endpoints."""

    texts_max: int
    characters_max: int
    running_max: int
    timeout_s: float
    load_wait_s: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request cost. `settled_nano` None: the ledger has not answered yet; it settles later."""

    hold_id: str
    build: str
    held_nano: int
    settled_nano: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """`data` in the order of the texts: vectors as little-endian float32, or scores."""

    data: list[Any]
    tokens: int
    receipt: Receipt


class Texts:
    """Both use cases. Raises TollgateError."""

    def __init__(self, models: Models, triton: TritonServer, flags: Flags, metering: Metering, limits: Limits) -> None:
        self._models = models
        self._triton = triton
        self._flags = flags
        self._metering = metering
        self._running = 0
        self.limits = limits

    async def embed(self, alias: str, texts: Sequence[str], caller: Identity) -> Answer:
        """A vector for each text."""
        model = self._model(alias, ("embedding",), caller)
        answer = await self._serve(model, {"op": "embed", "input": list(texts)}, _bounds(texts), caller)
        return Answer([base64.b64decode(vector) for vector in answer.data], answer.tokens, answer.receipt)

    async def rerank(self, alias: str, query: str, documents: Sequence[str], caller: Identity) -> Answer:
        """A score for each document: the model's own, or of an embedding model the cosine of its vectors."""
        model = self._model(alias, ("rerank", "embedding"), caller)
        if model.kind == "embedding":
            answer = await self.embed(alias, [query, *documents], caller)
            first, *others = (_floats(vector) for vector in answer.data)
            return Answer([_cosine(first, other) for other in others], answer.tokens, answer.receipt)
        body = {"op": "rerank", "query": query, "documents": list(documents)}
        bounds = [bound + _bound(query) for bound in _bounds(documents)]
        return await self._serve(model, body, bounds, caller)

    def _model(self, alias: str, kinds: Sequence[str], caller: Identity) -> Model:
        models = self._models.snapshot().catalogue.models
        model = next((model for model in models if model.alias == alias), None)
        if model is None or (caller.models is not None and alias not in caller.models):
            raise NotFound(
                f"The model `{alias}` does not exist or you do not have access to it.",
                code="model_not_found",
                param="model",
            )
        if model.kind not in kinds:
            raise InvalidRequest(
                f"The model `{alias}` is for {model.kind}; this needs one for {' or '.join(kinds)}.",
                code="unsupported_model",
                param="model",
            )
        return model

    async def _serve(self, model: Model, body: dict[str, Any], bounds: Sequence[int], caller: Identity) -> Answer:
        if self._running >= self.limits.running_max:
            raise Unavailable("Too many requests are under way. Retry.", code="overloaded", retry_after_s=BUSY_RETRY_S)
        self._running += 1
        try:
            build = await self._build(model, caller)
            worst = sum(min(bound, build.context_tokens) for bound in bounds)
            async with self._metering.hold(caller, model=model.alias, input_tokens=worst, max_output_tokens=0) as hold:
                hold.build = build.name
                found = await self._ask(build, body, caller)
                tokens = int(found["prompt_tokens"])
                settled = await hold.settle(
                    build=build.name, finish_reason=FINISHED, usage=Usage(input_tokens=min(tokens, worst))
                )
        finally:
            self._running -= 1
        settled_nano = settled.settled_nano if settled is not None else None
        return Answer(found["data"], tokens, Receipt(str(hold.id), build.name, hold.amount_nano, settled_nano))

    async def _build(self, model: Model, caller: Identity) -> Build:
        """The flags' build, or the stable one, loaded if it was not."""
        decision = self._flags.model_build(
            model.alias, user_id=caller.user_id, org_id=caller.org_id, plan=caller.plan, key_id=caller.key_id
        )
        if not decision.allowed:
            raise Unavailable(f"The model `{model.alias}` is switched off by the operator.", code="model_disabled")
        builds = {build.name: build for build in model.builds}
        for name in dict.fromkeys((decision.build, model.stable)):
            if name in builds:
                status = await self._models.ensure(name, self.limits.load_wait_s)
                if status.state is BuildState.READY:
                    return builds[name]
        raise Unavailable(
            f"No build of the model `{model.alias}` is ready. Retry.",
            code="model_loading",
            retry_after_s=LOADING_RETRY_S,
        )

    async def _ask(self, build: Build, body: dict[str, Any], caller: Identity) -> dict[str, Any]:
        try:
            answers = await self._triton.ask(
                build.name, body, timeout_s=self.limits.timeout_s, tenant=caller.org_id, priority=PRIORITY
            )
        except BuildRefused as e:
            raise _refused(e) from e
        except TritonError as e:
            raise Unavailable(
                "The model's engine is not available right now. Retry.",
                code="engine_unavailable",
                detail=str(e),
                retry_after_s=BUSY_RETRY_S,
            ) from e
        return answers[0]


def _refused(error: BuildRefused) -> TollgateError:
    """The engine's refusal in ours. Its messages are public sentences."""
    if error.code == "invalid_request":
        return InvalidRequest(str(error))
    if error.code == "context_length_exceeded":
        return InvalidRequest(str(error), code=error.code, param="input")
    if error.code == "queue_full":
        return Unavailable("The model's queue is full. Retry.", code="overloaded", retry_after_s=BUSY_RETRY_S)
    if error.code == "deadline_exceeded":
        return Timeout("The model did not finish this request in time.", code=error.code)
    return BadGateway("The model's engine failed on this request.", code="engine_error", detail=str(error))


def _bound(text: str) -> int:
    """A token takes a byte at least."""
    return len(text.encode()) + FRAME_TOKENS


def _bounds(texts: Sequence[str]) -> list[int]:
    return [_bound(text) for text in texts]


def _floats(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    length = math.hypot(*one) * math.hypot(*other)
    return product / length if length else 0.0
