"""Money, tokens and prices: pure rules.

Money is an `int` of nano-credits (10^-9 credit) that fits an int8. A price is nano-credits per request and per
million tokens of a class; a price that is a multiple of 0.001 credit per million tokens is exact per token. The cost
of a request is rounded up once, on the sum of its classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from services.billing.errors import AmountTooLarge
from shared.errors import InvalidRequest
from shared.money import NANO_PER_CREDIT

TOKENS_PER_PRICE = 10**6
INT8_MAX = 2**63 - 1
TOKENS_MAX = 10**9
DEFAULT_CLASS = "default"
CURRENCY = "credits"

_CREDITS = re.compile(r"(\d{1,10})(?:\.(\d{1,9}))?\Z", re.ASCII)


def parse_credits(text: str) -> int:
    """Decimal credits ("12.5") as nano-credits, exactly.

    Raises InvalidRequest for a sign, an exponent, more than nine decimals, or more than an int8 holds.
    """
    match = _CREDITS.match(text)
    if match is None:
        raise InvalidRequest("An amount is a decimal number of credits with at most nine decimals, such as 12.5.")
    whole, fraction = match.groups()
    nano = int(whole) * NANO_PER_CREDIT + int((fraction or "0").ljust(9, "0"))
    if nano > INT8_MAX:
        raise AmountTooLarge()
    return nano


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens by class. `input_tokens` includes the cached ones. Raises InvalidRequest for impossible figures."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        # Once for each operation and more: what is right is let go by without looking at names.
        if 0 <= self.cached_input_tokens <= self.input_tokens <= TOKENS_MAX and 0 <= self.output_tokens <= TOKENS_MAX:
            return
        for name in ("input_tokens", "cached_input_tokens", "output_tokens"):
            if not 0 <= getattr(self, name) <= TOKENS_MAX:
                raise InvalidRequest(f"{name} is from 0 to {TOKENS_MAX}.", param=name)
        raise InvalidRequest("cached_input_tokens is a part of input_tokens.", param="cached_input_tokens")

    def at_least(self, other: Usage) -> Usage:
        """The larger of both, class by class: reported usage never shrinks."""
        return Usage(
            max(self.input_tokens, other.input_tokens),
            max(self.cached_input_tokens, other.cached_input_tokens),
            max(self.output_tokens, other.output_tokens),
        )

    def with_output(self, output_tokens: int) -> Usage:
        """The same with other output."""
        return Usage(self.input_tokens, self.cached_input_tokens, output_tokens)

    def minus(self, other: Usage) -> tuple[int, int, int]:
        """Class by class; `other` is not larger."""
        return (
            self.input_tokens - other.input_tokens,
            self.cached_input_tokens - other.cached_input_tokens,
            self.output_tokens - other.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class PriceTerms:
    """What a price says, in nano-credits: per request, and per million tokens of a class."""

    per_request: int
    input: int
    cached_input: int
    output: int

    def __post_init__(self) -> None:
        for name in ("per_request", "input", "cached_input", "output"):
            if not 0 <= getattr(self, name) <= INT8_MAX:
                raise InvalidRequest(f"{name} is not a price.", param=name)
        if self.cached_input > self.input:
            # The hold prices every input token as not cached: that must be the worst case.
            raise InvalidRequest("Cached input does not cost more than input.", param="cached_input")

    def cost(self, usage: Usage) -> int:
        """Nano-credits for a request, rounded up once. Raises AmountTooLarge beyond an int8."""
        cost = self.per_request + -(-self._millionths(usage) // TOKENS_PER_PRICE)
        if cost > INT8_MAX:
            raise AmountTooLarge()
        return cost

    def output_tokens_within(self, usage: Usage, nano: int) -> int:
        """The most output tokens, up to the usage's own, with which the request costs no more than `nano`; or -1."""
        budget = (nano - self.per_request) * TOKENS_PER_PRICE
        rest = budget - self._millionths(Usage(usage.input_tokens, usage.cached_input_tokens, 0))
        if rest < 0:
            return -1
        return usage.output_tokens if self.output == 0 else min(usage.output_tokens, rest // self.output)

    def _millionths(self, usage: Usage) -> int:
        return (
            (usage.input_tokens - usage.cached_input_tokens) * self.input
            + usage.cached_input_tokens * self.cached_input
            + usage.output_tokens * self.output
        )


@dataclass(frozen=True, slots=True)
class Price:
    """One immutable version of the price of a model for a customer class."""

    id: UUID
    model: str
    customer_class: str
    terms: PriceTerms
    valid_from: datetime
    valid_until: datetime | None = None


def customer_classes(org_id: UUID | None, plan: str) -> list[str]:
    """The classes whose price a customer may get, the most particular first."""
    classes = [] if org_id is None else [f"org:{org_id}"]
    return [*classes, *([plan] if plan and plan != DEFAULT_CLASS else []), DEFAULT_CLASS]


@dataclass(frozen=True, slots=True)
class WalletView:
    """A wallet's sums, in nano-credits.

    `balance` is what is left of its grants, `held` the part that open holds reserve, `available` what a new hold may
    take, `receivable` what it owes for usage beyond its credits.
    """

    org_id: UUID
    balance: int
    held: int
    available: int
    receivable: int
    granted: int
    spent: int
    is_frozen: bool
    created_at: datetime
    frozen_reason: str | None = None


BudgetSubject = Literal["key", "member"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a key or a member may spend, held amounts included, in nano-credits of a calendar day and month (UTC).

    `spent_day` and `spent_month` are what it has spent of the present ones, without what is held.
    """

    subject: BudgetSubject
    subject_id: UUID
    day: int | None
    month: int | None
    spent_day: int = 0
    spent_month: int = 0
