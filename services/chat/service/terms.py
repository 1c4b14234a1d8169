"""What a completion may use, agreed before the engine starts: tokens of the minute, credits of the wallet."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from services.chat.domain.catalogue import Build, output_budget
from services.chat.domain.prompt import PROBES, Template
from services.chat.domain.request import ChatRequest, Limits
from services.chat.errors import TOKENS_ABOVE_LIMIT, not_covered, too_many_tokens
from services.chat.triton import Lost, TritonClient
from shared.errors import InvalidRequest, PaymentRequired, RateLimited, TollgateError
from shared.identity import Identity
from shared.limits import TokenLimiter, TokenSubject, token_headers
from shared.metering import Hold, Metering, Price, Receipt
from shared.telemetry import get_logger

log = get_logger(__name__)

TEMPLATES_MAX = 1_000
WALLETS_MAX = 10_000
AMPLE_FACTOR = 100
AMPLE_FOR_S = 60.0
# Refusals of a bound that the count may yet avoid.
_WORTH_COUNTING = frozenset(
    {"insufficient_quota", "credits_reserved", "budget_exceeded", "rate_limit_exceeded", TOKENS_ABOVE_LIMIT}
)


@dataclass(frozen=True, slots=True)
class _Known:
    """A wallet as a settlement left it, and the price of a token in its hold."""

    available_nano: int
    nano_per_token: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Terms:
    """`prompt_tokens` and `output_tokens`, at most, are for each choice.

    `is_clamped`: the hold covers fewer output tokens, and is to be extended on the way (service/allowance.py).
    """

    hold: Hold
    prompt_tokens: int
    output_tokens: int
    is_clamped: bool
    headers: Mapping[str, str]


class Treasury:
    """Makes terms. A short prompt is bounded by its bytes; only what may not fit, or is not covered so, is counted."""

    def __init__(self, metering: Metering, tokens: TokenLimiter, triton: TritonClient, limits: Limits) -> None:
        self._metering = metering
        self._tokens = tokens
        self._triton = triton
        self._limits = limits
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._templates: dict[tuple[str, str], Template | None] = {}

    def hold_cached(self, request: ChatRequest, caller: Identity, prompt_tokens: int) -> Hold:
        """A hold for an answer that is there already: its prompt, and the one token that every hold has."""
        return self._metering.hold(caller, model=request.model, input_tokens=prompt_tokens, max_output_tokens=1)

    async def prices(self, caller: Identity) -> dict[str, Price]:
        """The caller's prices by alias; empty while billing is away, since a list of models must not wait for it."""
        try:
            prices = await self._metering.prices(org_id=caller.org_id, plan=caller.plan)
        except TollgateError as e:
            log.warning("prices_unknown", code=e.code)
            return {}
        return {p.model: p for p in prices}

    async def terms(
        self, stack: AsyncExitStack, request: ChatRequest, caller: Identity, build: Build, *, lost: Lost
    ) -> Terms:
        """Enter reservation and hold into `stack`. Raises TollgateError: then nothing is held.

        First with the bound of the prompt. When that is refused, or does not fit the context, with its count.
        """
        asked = request.max_tokens
        if (offer := self.offer(request, build)) is not None:
            try:
                return await self._agree(stack, request, caller, *offer, clamp=False)
            except (PaymentRequired, RateLimited, InvalidRequest) as e:
                if e.code not in _WORTH_COUNTING:
                    raise
        prompt_tokens = await self._triton.count(build, request, lost=lost)
        budget = output_budget(
            asked,
            default=self._limits.max_tokens_default,
            prompt_tokens=prompt_tokens,
            context_tokens=build.context_tokens,
        )
        terms = await self._agree(stack, request, caller, prompt_tokens, budget, clamp=asked is None)
        await self._learn(build, lost)
        return terms

    async def _agree(
        self,
        stack: AsyncExitStack,
        request: ChatRequest,
        caller: Identity,
        prompt_tokens: int,
        output_tokens: int,
        *,
        clamp: bool,
    ) -> Terms:
        """Every choice reads the prompt and may write `output_tokens`."""
        choices = request.n
        subject = TokenSubject(caller.org_id, caller.limit_id, caller.tokens_per_minute)
        async with AsyncExitStack() as own:
            decision = await self._tokens.reserve(subject, choices * (prompt_tokens + output_tokens))
            headers = token_headers(decision)
            if not decision.admitted:
                raise too_many_tokens(decision.retry_after_s, headers, never_fits=decision.never_fits)
            hold = self._metering.hold(
                caller,
                model=request.model,
                input_tokens=choices * prompt_tokens,
                max_output_tokens=choices * output_tokens,
                clamp=clamp,
            )
            own.callback(lambda: self._tokens.settle(decision.reservation, _used(hold)))
            await own.enter_async_context(hold)
            if hold.output_tokens < choices:
                raise not_covered()
            stack.push_async_exit(own.pop_all())
        return Terms(hold, prompt_tokens, output_tokens, hold.output_tokens < choices * output_tokens, headers)

    def offer(self, request: ChatRequest, build: Build) -> tuple[int, int] | None:
        """Prompt tokens at most and output tokens, of a request that surely fits the context; None without a count."""
        template = self._templates.get((build.name, build.triton_version))
        bound = template.bound(request) if template is not None else None
        wanted = self._limits.max_tokens_default if request.max_tokens is None else request.max_tokens
        if bound is None or bound + wanted > build.context_tokens:
            return None
        return bound, wanted

    def may_start_early(self, request: ChatRequest, caller: Identity, build: Build) -> int | None:
        """Output tokens of each choice that the wallet covered many times over a moment ago; None: ask it first.

        The engine may then begin while tokens and credits are reserved. Nothing is sent before they are, and a refusal
        stops the engine: what could be lost is its work during two round trips.
        """
        known, offer = self._known.get((caller.org_id, request.model)), self.offer(request, build)
        if known is None or offer is None:
            return None
        if time.monotonic() - known.at_s > AMPLE_FOR_S:
            return None
        needed_nano = known.nano_per_token * request.n * sum(offer)
        return offer[1] if known.available_nano >= AMPLE_FACTOR * needed_nano else None

    def learn_wallet(self, request: ChatRequest, caller: Identity, terms: Terms, settled: Receipt | None) -> None:
        """Remember what a settlement left in the wallet."""
        key = (caller.org_id, request.model)
        self._known.pop(key, None)
        if settled is None:
            return
        tokens = request.n * terms.prompt_tokens + terms.hold.output_tokens
        self._known[key] = _Known(settled.available_nano, terms.hold.amount_nano / tokens, time.monotonic())
        if len(self._known) > WALLETS_MAX:
            self._known.popitem(last=False)

    async def _learn(self, build: Build, lost: Lost) -> None:
        """Measure a build's template, once; an engine that is away is asked again with the next request."""
        key = (build.name, build.triton_version)
        if key in self._templates or len(self._templates) >= TEMPLATES_MAX:
            return
        try:
            one, three = [
                await self._triton.count(build, ChatRequest(build.name, messages), lost=lost) for messages in PROBES
            ]
        except InvalidRequest:
            self._templates[key] = None  # this template refuses the probes: its prompts are counted
            return
        except TollgateError as e:
            log.info("template_not_measured", build=build.name, code=e.code, detail=e.detail)
            return
        self._templates[key] = Template.measured(one, three)


def _used(hold: Hold) -> int:
    return hold.usage.input_tokens + hold.usage.output_tokens
