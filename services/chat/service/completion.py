"""One completion: choose the builds, bound the prompt, reserve tokens and credits, generate, settle.

    complete(request, caller)  yields  Started, Delta … Finished …, Settled

An error raised before `Started` means that nothing was generated and nothing is owed. After it, an error or a closed
generator (the client has gone) stops the engine and settles the tokens that it had produced: the hold's and the
generations' blocks see to both, innermost first.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace

from services.chat.clients import CatalogueClient
from services.chat.domain.answers import LENGTH, Answer, answer
from services.chat.domain.breaker import Breakers
from services.chat.domain.catalogue import Build, BuildState, Model, fallback_chain
from services.chat.domain.request import ChatRequest, Limits, Priority
from services.chat.errors import (
    builds_failing,
    engine_failed,
    is_engine_fault,
    may_fall_back,
    model_disabled,
    model_loading,
    model_not_found,
    no_chat,
    too_busy,
)
from services.chat.service.allowance import Allowance
from services.chat.service.events import Delta, Event, Finished, Receipt, Settled, Started
from services.chat.service.generation import Total, merged
from services.chat.service.terms import Terms, Treasury
from services.chat.service.watch import NO_BUILD, Watch
from services.chat.triton import Generation, TritonClient
from shared.errors import TollgateError
from shared.flags import Flags
from shared.identity import Identity
from shared.telemetry import ChatMetrics, get_logger

log = get_logger(__name__)

CHAT = "chat"  # a kind of model


@dataclass(frozen=True, slots=True)
class _Early:
    """Generations that began before their terms were agreed."""

    max_tokens: int
    generations: list[Generation]

    def within(self, terms: Terms) -> _Early | None:
        """Itself, when it is what was agreed; otherwise it is stopped."""
        if terms.output_tokens == self.max_tokens and not terms.is_clamped:
            return self
        self.cancel()
        return None

    def cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()


@dataclass(slots=True)
class _Round:
    """What one completion knows while it is generated."""

    request: ChatRequest
    caller: Identity
    terms: Terms
    allowance: Allowance
    watch: Watch
    answers: list[Answer]
    total: Total
    early: _Early | None
    reasons: dict[int, str] = field(default_factory=dict)
    began: bool = False


class ChatService:
    """The use cases. Built once; holds no state of requests but their number."""

    def __init__(
        self,
        *,
        catalogue: CatalogueClient,
        flags: Flags,
        treasury: Treasury,
        triton: TritonClient,
        breakers: Breakers,
        limits: Limits,
        metrics: ChatMetrics,
    ) -> None:
        self._catalogue = catalogue
        self._flags = flags
        self._treasury = treasury
        self._triton = triton
        self._breakers = breakers
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

    def first_model(self, caller: Identity) -> str:
        """The alias of the first model for chats that the caller may use. Raises NotFound (model_not_found)."""
        found = next((m.alias for m in self.models(caller) if m.kind == CHAT and m.state is BuildState.READY), None)
        if found is None:
            raise model_not_found(CHAT)
        return found

    def build(self, request: ChatRequest, caller: Identity) -> Build:
        """The build that would serve this request now. Raises NotFound, Unavailable."""
        return self._chain(self.model(request.model, caller), caller)[0]

    async def count(self, request: ChatRequest, caller: Identity) -> tuple[int, Build]:
        """Tokens of the prompt, and the build that counted. Raises TollgateError. Costs nothing."""
        with self._slots(1):
            await self._awake(request.model, caller)
            build = self.build(request, caller)
            return await self._triton.count(build, request, lost=self._loss_of(build)), build

    async def complete(self, request: ChatRequest, caller: Identity) -> AsyncGenerator[Event, None]:
        """See the module. Close the generator (contextlib.aclosing) to stop. Raises TollgateError."""
        model = self.model(request.model, caller)
        request = self._served(request, caller)
        with self._slots(request.n), Watch(self._metrics, model.alias) as watch:
            model = await self._awake(model.alias, caller)
            chain = self._chain(model, caller)
            watch.build = chain[0].name
            async with AsyncExitStack() as stack:
                build, lost = chain[0], self._loss_of(chain[0])
                early = self._start_early(stack, request, caller, build)
                terms = await self._treasury.terms(stack, request, caller, build, lost=lost)
                early = early.within(terms) if early is not None else None
                answers = [answer(request) for _ in range(request.n)]
                allowance = Allowance(terms.hold, request.n * terms.output_tokens)
                stack.callback(allowance.close)
                work = _Round(request, caller, terms, allowance, watch, answers, Total(request.n), early)
                async with aclosing(self._generate(work, chain)) as events:
                    async for event in events:
                        yield event
                watch.outcome = LENGTH if LENGTH in work.reasons.values() else work.reasons[0]
                receipt = await self._settle(work)
            yield Settled(terms.hold.usage, receipt)

    async def _generate(self, work: _Round, chain: tuple[Build, ...]) -> AsyncGenerator[Event, None]:
        """The choices, by the first build that begins to answer."""
        needed = work.terms.prompt_tokens + work.terms.output_tokens
        chain = (chain[0], *(b for b in chain[1:] if b.context_tokens >= needed))
        for build in chain:
            self._breakers.trying(build.name)
            work.watch.build = work.terms.hold.build = build.name
            lost = self._loss_of(build)
            try:
                async with aclosing(self._by(build, work)) as events:
                    async for event in events:
                        yield event
            except TollgateError as e:
                if is_engine_fault(e) and not lost():  # one that was loaded anew since begins without failures
                    self._breakers.failed(build.name)
                if work.began or build is chain[-1] or not may_fall_back(e):
                    raise
                log.warning("fell_back", build=build.name, code=e.code, detail=e.detail)
            else:
                self._breakers.succeeded(build.name)
                return

    async def _by(self, build: Build, work: _Round) -> AsyncGenerator[Event, None]:
        request, early, work.early = work.request, work.early, None
        generations = (
            early.generations
            if early is not None
            else self._open(build, request, work.caller, work.terms.output_tokens, one_by_one=work.terms.is_clamped)
        )
        async with aclosing(merged(generations)) as pieces:
            async for index, chunk in pieces:
                usage, allowance = work.total.add(index, chunk.usage), work.allowance
                is_covered = usage.output_tokens < allowance.mark or await allowance.admits(usage.output_tokens)
                if is_covered:
                    work.terms.hold.record(usage)
                    work.watch.see(usage)
                if not work.began:
                    work.began = True
                    yield Started(build.name, request.priority.tier, work.terms.headers)
                if not is_covered:
                    for event in _cut_short(work):
                        yield event
                    return
                logprobs = chunk.logprobs
                for fields in work.answers[index].take(chunk.delta):
                    yield Delta(index, fields, logprobs)
                    logprobs = None
                if chunk.finish_reason is not None:
                    reason, rest = work.answers[index].end(chunk.finish_reason)
                    for fields in rest:
                        yield Delta(index, fields)
                    work.reasons[index] = reason
                    yield Finished(index, reason)
                    if len(work.reasons) == request.n:
                        return
        raise engine_failed("the stream ended without a finish_reason")

    def _open(
        self, build: Build, request: ChatRequest, caller: Identity, max_tokens: int, *, one_by_one: bool = False
    ) -> list[Generation]:
        """Start every choice."""
        lost, tenant = self._loss_of(build), caller.org_id
        return [
            self._triton.chat(
                build, request, max_tokens=max_tokens, tenant=tenant, lost=lost, choice=i, one_by_one=one_by_one
            )
            for i in range(request.n)
        ]

    def _start_early(
        self, stack: AsyncExitStack, request: ChatRequest, caller: Identity, build: Build
    ) -> _Early | None:
        """Start while the hold is placed, for a wallet that is known to cover it; `stack` stops what nobody takes."""
        max_tokens = self._treasury.may_start_early(request, caller, build)
        if max_tokens is None:
            return None
        early = _Early(max_tokens, self._open(build, request, caller, max_tokens))
        stack.callback(early.cancel)
        return early

    async def _awake(self, alias: str, caller: Identity) -> Model:
        """The model, an on-demand build of it loaded if none is ready. Raises TollgateError."""
        model = self.model(alias, caller)
        if model.kind != CHAT:
            raise no_chat(alias, model.kind)
        sleeper = model.sleeper
        if sleeper is None:
            return model
        await self._catalogue.load(sleeper.name, self.limits.load_wait_s)
        return self.model(alias, caller)

    def _chain(self, model: Model, caller: Identity) -> tuple[Build, ...]:
        """The builds to try, best first. Raises Unavailable."""
        decision = self._flags.model_build(
            model.alias, user_id=caller.user_id, org_id=caller.org_id, plan=caller.plan, key_id=caller.key_id
        )
        if not decision.allowed:
            self._metrics.flag_decisions.labels(model.alias, NO_BUILD, decision.reason).inc()
            raise model_disabled(model.alias)
        ready = fallback_chain(model, decision.build)
        chosen = ready[0].name if ready else NO_BUILD
        self._metrics.flag_decisions.labels(model.alias, chosen, decision.reason).inc()
        if not ready:
            raise model_loading(model.alias)
        chain = tuple(b for b in ready if self._breakers.admits(b.name))
        if not chain:
            raise builds_failing(model.alias)
        return chain

    def _served(self, request: ChatRequest, caller: Identity) -> ChatRequest:
        """The request in the service tier that the caller's plan has."""
        if request.priority is Priority.PRIORITY and caller.plan not in self.limits.priority_plans:
            return replace(request, priority=Priority.DEFAULT)
        return request

    def _loss_of(self, build: Build) -> Callable[[], bool]:
        """Whether the build has been out of service since now."""
        now_s = time.monotonic()
        return lambda: self._catalogue.was_lost(build.name, now_s)

    async def _settle(self, work: _Round) -> Receipt:
        hold, build = work.terms.hold, work.watch.build
        assert work.watch.outcome is not None
        settled = await hold.settle(build=build, finish_reason=work.watch.outcome)
        self._treasury.learn_wallet(work.request, work.caller, work.terms, settled)
        return Receipt(
            hold_id=str(hold.id),
            build=build,
            held_nano=hold.amount_nano,
            settled_nano=settled.settled_nano if settled is not None else None,
            limited_by=work.allowance.limited_by,
            available_nano=settled.available_nano if settled is not None else None,
        )

    @contextmanager
    def _slots(self, count: int) -> Iterator[None]:
        """So many of `generations_max`. Raises Unavailable (overloaded) when they are taken."""
        if self._generations + count > self.limits.generations_max:
            raise too_busy()
        self._generations += count
        self._metrics.streams.set(self._generations)
        try:
            yield
        finally:
            self._generations -= count
            self._metrics.streams.set(self._generations)


def _cut_short(work: _Round) -> Iterator[Event]:
    """The ends of the choices that are not at theirs."""
    for index, choice in enumerate(work.answers):
        if index not in work.reasons:
            reason, rest = choice.end(LENGTH)
            for fields in rest:
                yield Delta(index, fields)
            work.reasons[index] = reason
            yield Finished(index, reason)


def _may_use(caller: Identity, alias: str) -> bool:
    return caller.models is None or alias in caller.models
