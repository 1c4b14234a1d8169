"""What billing asks of whoever takes the money.

A top-up is written down before its provider hears of it, and its id is the idempotency key there: a call that was cut
off is made again with the same key and finds what it made. What a provider reports, by an answer or a webhook, is one
`PaymentReport`; reports may come late, twice and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from uuid import UUID


class PaymentState(StrEnum):
    OPEN = "open"
    PAID = "paid"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be paid: `money_minor` in the smallest unit of the currency, for `amount` nano-credits."""

    topup_id: UUID
    org_id: UUID
    amount: int
    currency: str
    money_minor: int


@dataclass(frozen=True, slots=True)
class Checkout:
    """Where the customer pays; no `url` where there is nothing left to do for them."""

    session_id: str
    url: str | None
    state: PaymentState


@dataclass(frozen=True, slots=True)
class PaymentReport:
    """What a provider says about the payment of one top-up."""

    topup_id: UUID
    session_id: str
    state: PaymentState
    currency: str
    money_minor: int


@dataclass(frozen=True, slots=True)
class MoneyMoved:
    """Something of a payment went back, or is disputed: how it stands is to be asked."""

    payment_id: str


class DisputeState(StrEnum):
    OPEN = "open"
    WON = "won"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Dispute:
    id: str
    state: DisputeState
    money_minor: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of the money of a paid top-up: `refunded_minor` in all, and every dispute."""

    topup_id: UUID
    currency: str
    refunded_minor: int
    disputes: tuple[Dispute, ...]


class PaymentProvider(Protocol):
    """Every call has a time limit of its own and raises PaymentUnavailable when nobody knows what came of it."""

    name: str

    async def open_checkout(self, order: Order) -> Checkout:
        """Begin the payment of a top-up, or find the one that was begun. Raises PaymentRefused."""

    async def look_up(self, order: Order, session_id: str) -> PaymentReport:
        """How a payment stands."""

    async def standing(self, payment_id: str) -> Standing | None:
        """What became of a payment's money; None for one that is not ours."""

    def read_event(self, payload: bytes, signature: str) -> PaymentReport | MoneyMoved | None:
        """What a webhook reports; None when it is about something else. Raises InvalidSignature, InvalidRequest."""

    async def close(self) -> None:
        """Let go of connections."""
