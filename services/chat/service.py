"""One completion: choose the build, count, hold the credits, generate, settle.

    complete(request, caller)  yields  Started, Delta …, Ended, Settled

An error raised before `Started` means that nothing was generated and nothing is owed. After it, an error or a closed
generator (the client has gone) stops the engine and settles the tokens that it had produced: the hold's and the
generation's blocks see to both, innermost first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from opentelemetry.trace import SpanKind

from services.chat.clients import CatalogueClient
from services.chat.domain import Build, ChatRequest, Limits, Model, Receipt, choose_build, output_budget
from services.chat.errors import engine_failed, model_disabled, model_loading, model_not_found, too_busy
from services.chat.triton import Chunk, TritonClient
from shared import telemetry
from shared.errors import TollgateError
from shared.flags import Flags
from shared.identity import Identity
from shared.metering import Hold, Metering, Price, Usage
from shared.telemetry import ChatMetrics, get_logger, span

log = get_logger(__name__)

NO_BUILD = "none"


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has begun to answer."""

    build: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What the engine added to the message."""

    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine has finished; the settlement follows."""

    reason: str


@dataclass(frozen=True, slots=True)
class Settled:
    """The last event: what was used and what it cost."""

    usage: Usage
    receipt: Receipt


Event = Started | Delta | Ended | Settled


class ChatService:
    """The use cases. Built once; holds no state of requests but their number."""

    def __init__(
        self,
        *,
        catalogue: CatalogueClient,
        flags: Flags,
        metering: Metering,
        triton: TritonClient,
        limits: Limits,
        metrics: ChatMetrics,
    ) -> None:
        self._catalogue = catalogue
        self._flags = flags
        self._metering = metering
        self._triton = triton
        self._metrics = metrics
        self._generations = 0
        self.limits = limits

    def models(self, caller: Identity) -> list[Model]:
        """The models that the caller may use, by alias."""
        models = self._catalogue.last.models.values()
        return sorted((m for m in models if _may_use(caller, m.alias)), key=lambda m: m.alias)

    def model(self, alias: str, caller: Identity) -> Model:
        """Raises NotFound (model_not_found), for a model that the caller may not use as for one that is not there."""
        model = self._catalogue.last.models.get(alias)
        if model is None or not _may_use(caller, alias):
            raise model_not_found(alias)
        return model

    async def prices(self, caller: Identity) -> dict[str, Price]:
        """The caller's prices by alias; empty while billing is away, since a list of models must not wait for it."""
        try:
            prices = await self._metering.prices(org_id=caller.org_id, plan=caller.plan)
        except TollgateError as e:
            log.warning("prices_unknown", code=e.code)
            return {}
        return {p.model: p for p in prices}

    async def complete(self, request: ChatRequest, caller: Identity) -> AsyncGenerator[Event, None]:
        """See the module. Close the generator (contextlib.aclosing) to stop. Raises TollgateError."""
        model = self.model(request.model, caller)
        with self._slot(), _Watch(self._metrics, model.alias) as watch:
            build = self._build(model, caller)
            watch.build = build.name
            lost = self._loss_of(build)
            prompt_tokens = await self._triton.count(build, request, lost=lost)
            budget = output_budget(
                request.max_tokens,
                default=self.limits.max_tokens_default,
                prompt_tokens=prompt_tokens,
                context_tokens=build.context_tokens,
            )
            async with self._metering.hold(
                caller,
                model=model.alias,
                input_tokens=prompt_tokens,
                max_output_tokens=budget,
                clamp=request.max_tokens is None,
            ) as hold:
                hold.build = build.name
                generation = self._triton.chat(
                    build, request, max_tokens=hold.output_tokens, tenant=caller.org_id, lost=lost
                )
                async with generation as chunks:
                    async for chunk in chunks:
                        hold.record(chunk.usage)
                        if watch.see(chunk):
                            yield Started(build.name)
                        if chunk.delta:
                            yield Delta(chunk.delta)
                if watch.outcome is None:
                    raise engine_failed("the stream ended without a finish_reason")
                yield Ended(watch.outcome)
                receipt = await self._settle(hold, build, watch.outcome)
            yield Settled(hold.usage, receipt)

    def _build(self, model: Model, caller: Identity) -> Build:
        decision = self._flags.model_build(
            model.alias, user_id=caller.user_id, org_id=caller.org_id, plan=caller.plan, key_id=caller.key_id
        )
        if not decision.allowed:
            self._metrics.flag_decisions.labels(model.alias, NO_BUILD, decision.reason).inc()
            raise model_disabled(model.alias)
        build = choose_build(model, decision.build)
        self._metrics.flag_decisions.labels(model.alias, build.name if build else NO_BUILD, decision.reason).inc()
        if build is None:
            raise model_loading(model.alias)
        return build

    def _loss_of(self, build: Build) -> Callable[[], bool]:
        """Whether the build has been out of service since now."""
        now_s = time.monotonic()
        return lambda: self._catalogue.was_lost(build.name, now_s)

    async def _settle(self, hold: Hold, build: Build, finish_reason: str) -> Receipt:
        settled = await hold.settle(build=build.name, finish_reason=finish_reason)
        return Receipt(
            hold_id=str(hold.id),
            build=build.name,
            held_nano=hold.amount_nano,
            settled_nano=settled.settled_nano if settled is not None else None,
        )

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """One of `generations_max`. Raises Unavailable (overloaded) when all are taken."""
        if self._generations >= self.limits.generations_max:
            raise too_busy()
        self._generations += 1
        self._metrics.streams.set(self._generations)
        try:
            yield
        finally:
            self._generations -= 1
            self._metrics.streams.set(self._generations)


class _Watch:
    """Measures one completion: span, time to first token, time per token, tokens, outcome."""

    def __init__(self, metrics: ChatMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._began_s = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self._usage = Usage()
        self._has_started = False
        self.build = NO_BUILD
        self.outcome: str | None = None

    def see(self, chunk: Chunk) -> bool:
        """Take in a chunk; True for the first."""
        if chunk.usage.output_tokens:
            self._last_s = time.perf_counter()
            if not self._first_s:
                self._first_s = self._last_s
        self._usage = chunk.usage
        self.outcome = chunk.finish_reason or self.outcome
        is_first, self._has_started = not self._has_started, True
        return is_first

    def __enter__(self) -> _Watch:
        self._span_block = span(
            f"chat {self._model}", SpanKind.CLIENT, attributes={telemetry.GEN_AI_REQUEST_MODEL: self._model}
        )
        self._span = self._span_block.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = self._conclude(exc)
        labels, usage = (self._model, self.build), self._usage
        self._metrics.requests.labels(*labels, outcome).inc()
        if usage.output_tokens:
            self._metrics.ttft_s.labels(*labels).observe(self._first_s - self._began_s)
            for kind, count in (
                ("input", usage.input_tokens),
                ("cached", usage.cached_input_tokens),
                ("output", usage.output_tokens),
            ):
                self._metrics.tokens.labels(*labels, kind).inc(count)
        if usage.output_tokens > 1:
            per_token_s = (self._last_s - self._first_s) / (usage.output_tokens - 1)
            self._metrics.token_s.labels(*labels).observe(per_token_s)
        self._span.set_attributes(
            {
                telemetry.GEN_AI_RESPONSE_MODEL: self.build,
                telemetry.GEN_AI_INPUT_TOKENS: usage.input_tokens,
                telemetry.GEN_AI_OUTPUT_TOKENS: usage.output_tokens,
                telemetry.GEN_AI_FINISH_REASONS: outcome,
            }
        )
        self._span_block.__exit__(exc_type, exc, traceback)
        log.info(
            "completion",
            model=self._model,
            build=self.build,
            outcome=outcome,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            duration_ms=round((time.perf_counter() - self._began_s) * 1000, 1),
        )

    def _conclude(self, exc: BaseException | None) -> str:
        if isinstance(exc, TollgateError):
            return exc.code
        if isinstance(exc, asyncio.CancelledError | GeneratorExit):
            return "cancelled"
        if exc is not None or self.outcome is None:
            return "internal_error"
        return self.outcome


def _may_use(caller: Identity, alias: str) -> bool:
    return caller.models is None or alias in caller.models
