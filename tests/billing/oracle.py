"""A naive model of a wallet, written from the rules alone: lists, fractions and brute force, no accounts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from uuid import UUID

from services.billing.domain import PriceTerms, Usage
from services.billing.ledger.operations import (
    ExpireGrant,
    ExpireHold,
    ExtendHold,
    GrantCredits,
    Heartbeat,
    Operation,
    PlaceHold,
    Settle,
    Void,
)


def cost(terms: PriceTerms, usage: Usage) -> int:
    """What a request costs, with fractions of a nano-credit until the end."""
    plain = usage.input_tokens - usage.cached_input_tokens
    exact = Fraction(terms.input, 10**6) * plain
    exact += Fraction(terms.cached_input, 10**6) * usage.cached_input_tokens
    exact += Fraction(terms.output, 10**6) * usage.output_tokens
    return terms.per_request + math.ceil(exact)


@dataclass
class Pot:
    """A grant: how many nano-credits are left, and how many of them each hold has."""

    id: UUID
    priority: int
    expires_at: datetime | None
    left: int
    held: dict[UUID, int] = field(default_factory=dict)

    def free(self) -> int:
        return self.left - sum(self.held.values())


@dataclass
class OpenRequest:
    amount: int
    worst: Usage
    expires_at: datetime
    parts: list[tuple[UUID, int]]
    usage: Usage = field(default_factory=Usage)


class Refused(Exception):
    """The code of the refusal."""


class Oracle:
    """One wallet at one price. `apply` answers with a few figures that the kernel's results must match."""

    def __init__(self, terms: PriceTerms) -> None:
        self.terms = terms
        self.pots: list[Pot] = []
        self.open: dict[UUID, OpenRequest] = {}
        self.expired: dict[UUID, tuple[Usage, int]] = {}
        self.done: set[UUID] = set()
        self.owed = 0
        self.spent = 0
        self.lapsed = 0

    def live(self, now: datetime) -> list[Pot]:
        pots = [p for p in self.pots if p.expires_at is None or p.expires_at > now]
        far = datetime.max.replace(tzinfo=now.tzinfo)
        return sorted(pots, key=lambda p: (p.priority, p.expires_at or far, p.id))

    def available(self, now: datetime) -> int:
        return sum(p.free() for p in self.live(now))

    def apply(self, op: Operation, now: datetime) -> tuple[int, ...]:
        match op:
            case GrantCredits():
                if op.expires_at is not None and op.expires_at <= now:
                    raise Refused("expiry_in_past")
                self.pots.append(Pot(op.account_id, op.priority, op.expires_at, op.amount))
                self._tidy(now)
                return (op.amount, self.available(now), self.owed)
            case PlaceHold():
                return self._place(op, now)
            case ExtendHold():
                return self._extend(op, now)
            case Heartbeat():
                request = self._open(op.hold_id)
                request.expires_at = max(request.expires_at, now + timedelta(milliseconds=op.ttl_ms))
                request.usage = request.usage.at_least(op.usage)
                return ()
            case Settle():
                return self._settle(op, now)
            case Void():
                amount = self._open(op.hold_id).amount
                self._close(op.hold_id)
                self._tidy(now)
                return (amount,)
            case ExpireHold():
                return self._expire(op, now)
            case ExpireGrant():
                lapses = [p.free() for p in self.pots if p.id == op.account_id and p.expires_at and p.expires_at <= now]
                self._tidy(now)
                return (sum(lapses),)
        raise AssertionError(op.kind)

    def _open(self, hold_id: UUID) -> OpenRequest:
        if hold_id in self.open:
            return self.open[hold_id]
        raise Refused("hold_resolved" if hold_id in self.done or hold_id in self.expired else "hold_not_found")

    def _place(self, op: PlaceHold, now: datetime) -> tuple[int, ...]:
        worst = op.worst_case
        candidates = range(worst.output_tokens, 0, -1) if op.clamp else ()
        wanted = [cost(self.terms, worst)]
        wanted += [cost(self.terms, Usage(worst.input_tokens, 0, n)) for n in candidates]
        outputs = [worst.output_tokens, *candidates]
        for amount, output in zip(wanted, outputs, strict=True):
            if self.owed == 0 and amount <= self.available(now):
                covers = Usage(worst.input_tokens, worst.cached_input_tokens, output)
                parts = self._reserve(op.hold_id, amount, now)
                self.open[op.hold_id] = OpenRequest(amount, covers, now + timedelta(milliseconds=op.ttl_ms), parts)
                return (amount, output, self.available(now))
        could = sum(p.left for p in self.live(now))
        raise Refused("credits_reserved" if self.owed == 0 and min(wanted) <= could else "insufficient_quota")

    def _extend(self, op: ExtendHold, now: datetime) -> tuple[int, ...]:
        request = self._open(op.hold_id)
        if op.output_tokens <= request.worst.output_tokens:
            return (request.amount, request.worst.output_tokens, self.available(now))
        more = 0
        for output in range(op.output_tokens, request.worst.output_tokens, -1):
            covers = Usage(request.worst.input_tokens, request.worst.cached_input_tokens, output)
            more = cost(self.terms, covers) - request.amount
            if self.owed == 0 and more <= self.available(now):
                request.parts += self._reserve(op.hold_id, more, now)
                request.amount += more
                request.worst = covers
                return (request.amount, output, self.available(now))
        others = sum(p.left - p.held.get(op.hold_id, 0) for p in self.live(now))
        raise Refused("credits_reserved" if self.owed == 0 and more <= others else "insufficient_quota")

    def _reserve(self, hold_id: UUID, amount: int, now: datetime) -> list[tuple[UUID, int]]:
        parts = []
        for pot in self.live(now):
            part = min(pot.free(), amount)
            if part:
                pot.held[hold_id] = pot.held.get(hold_id, 0) + part
                parts.append((pot.id, part))
                amount -= part
        return parts

    def _settle(self, op: Settle, now: datetime) -> tuple[int, ...]:
        if op.hold_id in self.expired:
            before, paid = self.expired.pop(op.hold_id)
            self.done.add(op.hold_id)
            total = max(paid, cost(self.terms, op.usage.at_least(before)))
            settled = self._take([], total - paid, now)
        else:
            request = self._open(op.hold_id)
            total = cost(self.terms, op.usage.at_least(request.usage))
            settled = self._take(self._close(op.hold_id), total, now)
        self._tidy(now)
        return (total, settled, self.owed, self.available(now))

    def _expire(self, op: ExpireHold, now: datetime) -> tuple[int, ...]:
        request = self._open(op.hold_id)
        if request.expires_at > now:
            raise Refused("hold_not_expired")
        total = cost(self.terms, request.usage) if request.usage.output_tokens else 0
        settled = self._take(self._close(op.hold_id), total, now)
        self.done.discard(op.hold_id)
        self.expired[op.hold_id] = (request.usage if request.usage.output_tokens else Usage(), total)
        self._tidy(now)
        return (total, settled, self.owed, self.available(now))

    def _close(self, hold_id: UUID) -> list[tuple[UUID, int]]:
        self.done.add(hold_id)
        for pot in self.pots:
            pot.held.pop(hold_id, None)
        return self.open.pop(hold_id).parts

    def _take(self, reserved: list[tuple[UUID, int]], amount: int, now: datetime) -> int:
        """From the hold's own credits in the order they were reserved, then from what is free; the rest is owed."""
        rest = amount
        by_id = {pot.id: pot for pot in self.pots}
        for pot_id, held in reserved:
            part = min(held, rest)
            by_id[pot_id].left -= part
            rest -= part
        for pot in self.live(now):
            part = min(pot.free(), rest)
            pot.left -= part
            rest -= part
        self.owed += rest
        self.spent += amount
        return amount - rest

    def _tidy(self, now: datetime) -> None:
        for pot in self.pots:
            if pot.expires_at is not None and pot.expires_at <= now and pot.free():
                self.lapsed += pot.free()
                pot.left -= pot.free()
        for pot in self.live(now):
            part = min(pot.free(), self.owed)
            pot.left -= part
            self.owed -= part
