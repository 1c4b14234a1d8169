"""A naive model of a wallet, written from the rules alone: lists, fractions and brute force, no accounts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from fractions import Fraction
from typing import Any
from uuid import UUID

from services.billing.domain import PriceTerms, Usage
from services.billing.ledger.operations import (
    GRANT_PRIORITY,
    Charge,
    ExpireGrant,
    ExpireHold,
    ExtendHold,
    Freeze,
    GrantCredits,
    Heartbeat,
    Operation,
    PlaceHold,
    Refund,
    Settle,
    TakeBack,
    Void,
)

OWED = UUID(int=0)  # stands for a pot where something was taken that was not there
BUDGETLESS = 10**30
Person = tuple[UUID | None, UUID | None]


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
    who: Person
    usage: Usage = field(default_factory=Usage)


@dataclass
class Limits:
    """The budgets of a key or a member, with what it has spent on which day. Its day never goes back."""

    day: int | None
    month: int | None
    today: date
    spent: list[tuple[date, int]]

    def room(self) -> int:
        this_month = (self.today.year, self.today.month)
        left = [BUDGETLESS]
        if self.day is not None:
            left.append(self.day - sum(cost for day, cost in self.spent if day == self.today))
        if self.month is not None:
            left.append(self.month - sum(cost for day, cost in self.spent if (day.year, day.month) == this_month))
        return min(left)


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
        self.people: dict[UUID, Person] = {}
        self.owed = 0
        self.spent = 0
        self.lapsed = 0
        self.frozen = False
        # Of what each request and each charge took, and has not been given back: the pot of each single nano-credit.
        self.taken: dict[UUID, list[UUID]] = {}
        self.returned: dict[UUID, int] = {}  # of each grant, what was taken back of it
        self.budgets: dict[UUID, Limits] = {}
        self.usage: list[tuple[date, Person, int]] = []

    def set_budget(self, subject: UUID, day: int | None, month: int | None, now: datetime) -> None:
        """Of a key or a member, counting what it has spent before."""
        today = now.date()
        spent = [(at, cost) for at, who, cost in self.usage if subject in who and at <= today]
        self.budgets[subject] = Limits(day, month, today, spent)

    def _room(self, who: Person, now: datetime) -> int:
        rooms = [BUDGETLESS]
        for subject in who:
            if subject is not None and subject in self.budgets:
                limits = self.budgets[subject]
                limits.today = max(limits.today, now.date())
                rooms.append(limits.room() - sum(r.amount for r in self.open.values() if subject in r.who))
        return min(rooms)

    def _record(self, who: Person, cost: int, now: datetime) -> None:
        self.usage.append((now.date(), who, cost))
        for subject in who:
            if subject is not None and subject in self.budgets:
                limits = self.budgets[subject]
                limits.today = max(limits.today, now.date())
                limits.spent.append((limits.today, cost))

    def live(self, now: datetime) -> list[Pot]:
        pots = [p for p in self.pots if p.expires_at is None or p.expires_at > now]
        far = datetime.max.replace(tzinfo=now.tzinfo)
        return sorted(pots, key=lambda p: (p.priority, p.expires_at or far, p.id))

    def available(self, now: datetime) -> int:
        return sum(p.free() for p in self.live(now))

    def apply(self, op: Operation, now: datetime) -> tuple[int, ...]:
        rules: dict[type[Operation], Callable[[Any, datetime], tuple[int, ...]]] = {
            GrantCredits: self._grant,
            PlaceHold: self._place,
            ExtendHold: self._extend,
            Heartbeat: self._beat,
            Settle: self._settle,
            Void: self._void,
            ExpireHold: self._expire,
            ExpireGrant: self._expire_grant,
            Charge: self._charge,
            Refund: self._refund,
            TakeBack: self._take_back,
            Freeze: self._freeze,
        }
        return rules[type(op)](op, now)

    def _grant(self, op: GrantCredits, now: datetime) -> tuple[int, ...]:
        if op.expires_at is not None and op.expires_at <= now:
            raise Refused("expiry_in_past")
        self.pots.append(Pot(op.account_id, op.priority, op.expires_at, op.amount))
        self._tidy(now)
        return (op.amount, self.available(now), self.owed)

    def _beat(self, op: Heartbeat, now: datetime) -> tuple[int, ...]:
        request = self._open(op.hold_id)
        request.expires_at = max(request.expires_at, now + timedelta(milliseconds=op.ttl_ms))
        request.usage = request.usage.at_least(op.usage)
        return ()

    def _void(self, op: Void, now: datetime) -> tuple[int, ...]:
        amount = self._open(op.hold_id).amount
        self._close(op.hold_id)
        self._tidy(now)
        return (amount,)

    def _expire_grant(self, op: ExpireGrant, now: datetime) -> tuple[int, ...]:
        lapses = [p.free() for p in self.pots if p.id == op.account_id and p.expires_at and p.expires_at <= now]
        self._tidy(now)
        return (sum(lapses),)

    def _freeze(self, op: Freeze, now: datetime) -> tuple[int, ...]:
        self.frozen = op.frozen
        return (op.frozen,)

    def _charge(self, op: Charge, now: datetime) -> tuple[int, ...]:
        if self.frozen:
            raise Refused("wallet_frozen")
        if self.owed or op.amount > sum(p.left for p in self.live(now)):
            raise Refused("insufficient_quota")
        if op.amount > self.available(now):
            raise Refused("credits_reserved")
        who = (op.key_id, op.user_id)
        if op.amount > self._room(who, now):
            raise Refused("budget_exceeded")
        self._take(op.charge_id, [], op.amount, now)
        self._record(who, op.amount, now)
        return (op.amount, self.available(now))

    def _refund(self, op: Refund, now: datetime) -> tuple[int, ...]:
        taken = self.taken.get(op.source_id, [])
        amount = len(taken) if op.amount is None else op.amount
        if not taken:
            raise Refused("nothing_to_refund")
        if amount > len(taken):
            raise Refused("refund_too_large")
        by_id, fresh = {pot.id: pot for pot in self.pots}, 0
        for _ in range(amount):
            pot_id = taken.pop()
            if pot_id != OWED:
                by_id[pot_id].left += 1
            elif self.owed:
                self.owed -= 1
            else:
                fresh += 1
        if fresh:
            self.pots.append(Pot(op.account_id, GRANT_PRIORITY, None, fresh))
        self.spent -= amount
        self._tidy(now)
        return (amount, len(taken), self.owed, self.available(now))

    def _take_back(self, op: TakeBack, now: datetime) -> tuple[int, ...]:
        before = self.returned.get(op.grant_id, 0)
        missing = amount = max(0, op.total - before)
        self.returned[op.grant_id] = before + amount
        for pot in self.pots:
            while missing and pot.id == op.grant_id and pot.free():
                pot.left -= 1
                missing -= 1
        self.owed += missing
        self._tidy(now)
        return (amount, before + amount, self.owed, self.available(now))

    def _open(self, hold_id: UUID) -> OpenRequest:
        if hold_id in self.open:
            return self.open[hold_id]
        raise Refused("hold_resolved" if hold_id in self.done or hold_id in self.expired else "hold_not_found")

    def _place(self, op: PlaceHold, now: datetime) -> tuple[int, ...]:
        if self.frozen:
            raise Refused("wallet_frozen")
        worst, who = op.worst_case, (op.key_id, op.user_id)
        candidates = range(worst.output_tokens, 0, -1) if op.clamp else ()
        wanted = [cost(self.terms, worst)]
        wanted += [cost(self.terms, Usage(worst.input_tokens, 0, n)) for n in candidates]
        outputs, room = [worst.output_tokens, *candidates], self._room(who, now)
        for amount, output in zip(wanted, outputs, strict=True):
            if self.owed == 0 and amount <= self.available(now) and amount <= room:
                covers = Usage(worst.input_tokens, worst.cached_input_tokens, output)
                parts = self._reserve(op.hold_id, amount, now)
                expires_at = now + timedelta(milliseconds=op.ttl_ms)
                self.open[op.hold_id] = OpenRequest(amount, covers, expires_at, parts, who)
                return (amount, output, self.available(now))
        could = sum(p.left for p in self.live(now))
        raise self._refusal(min(wanted), could, now)

    def _refusal(self, least: int, could: int, now: datetime) -> Refused:
        if self.owed == 0 and least <= self.available(now):
            return Refused("budget_exceeded")
        return Refused("credits_reserved" if self.owed == 0 and least <= could else "insufficient_quota")

    def _extend(self, op: ExtendHold, now: datetime) -> tuple[int, ...]:
        request = self._open(op.hold_id)
        if self.frozen:
            raise Refused("wallet_frozen")
        if op.output_tokens <= request.worst.output_tokens:
            return (request.amount, request.worst.output_tokens, self.available(now))
        more, room = 0, self._room(request.who, now)
        for output in range(op.output_tokens, request.worst.output_tokens, -1):
            covers = Usage(request.worst.input_tokens, request.worst.cached_input_tokens, output)
            more = cost(self.terms, covers) - request.amount
            if self.owed == 0 and more <= self.available(now) and more <= room:
                request.parts += self._reserve(op.hold_id, more, now)
                request.amount += more
                request.worst = covers
                return (request.amount, output, self.available(now))
        others = sum(p.left - p.held.get(op.hold_id, 0) for p in self.live(now))
        raise self._refusal(more, others, now)

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
            settled = self._take(op.hold_id, [], total - paid, now)
            self._record(self.people[op.hold_id], total - paid, now)
        else:
            request = self._open(op.hold_id)
            total = cost(self.terms, op.usage.at_least(request.usage))
            settled = self._take(op.hold_id, self._close(op.hold_id), total, now)
            self._record(request.who, total, now)
        self._tidy(now)
        return (total, settled, self.owed, self.available(now))

    def _expire(self, op: ExpireHold, now: datetime) -> tuple[int, ...]:
        request = self._open(op.hold_id)
        if request.expires_at > now:
            raise Refused("hold_not_expired")
        total = cost(self.terms, request.usage) if request.usage.output_tokens else 0
        settled = self._take(op.hold_id, self._close(op.hold_id), total, now)
        self._record(request.who, total, now)
        self.people[op.hold_id] = request.who
        self.done.discard(op.hold_id)
        self.expired[op.hold_id] = (request.usage if request.usage.output_tokens else Usage(), total)
        self._tidy(now)
        return (total, settled, self.owed, self.available(now))

    def _close(self, hold_id: UUID) -> list[tuple[UUID, int]]:
        self.done.add(hold_id)
        for pot in self.pots:
            pot.held.pop(hold_id, None)
        return self.open.pop(hold_id).parts

    def _take(self, source: UUID, reserved: list[tuple[UUID, int]], amount: int, now: datetime) -> int:
        """From the hold's own credits in the order they were reserved, then from what is free; the rest is owed."""
        rest = amount
        by_id, draws = {pot.id: pot for pot in self.pots}, dict.fromkeys((pot_id for pot_id, _ in reserved), 0)
        for pot_id, held in reserved:
            part = min(held, rest)
            by_id[pot_id].left -= part
            draws[pot_id] += part
            rest -= part
        for pot in self.live(now):
            part = min(pot.free(), rest)
            pot.left -= part
            draws[pot.id] = draws.get(pot.id, 0) + part
            rest -= part
        taken = self.taken.setdefault(source, [])
        for pot_id, part in (*draws.items(), (OWED, rest)):
            taken += [pot_id] * part
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
