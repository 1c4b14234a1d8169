"""Kernel and naive model side by side: operations at random go to both, and what they answer is compared."""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from services.billing.domain import PriceTerms, Usage
from services.billing.ledger.operations import (
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
from services.billing.ledger.results import Extended, Result
from services.billing.ledger.spending import Period, Subject
from shared.errors import TollgateError
from shared.ids import uuid7
from tests.billing.memory import MODEL, MemoryLedger
from tests.billing.oracle import Oracle, Refused

START = datetime(2026, 1, 1, tzinfo=UTC)
WALLET = UUID(int=7)
CREDIT = 10**9
KEYS, MEMBERS = (UUID(int=11), UUID(int=12)), (UUID(int=21), UUID(int=22))
PERIODS: tuple[Period, ...] = ("day", "month")
RECENT = 25
WEIGHTS = {
    "grant": 10,
    "hold": 33,
    "extend": 8,
    "heartbeat": 10,
    "settle": 17,
    "void": 6,
    "expire": 10,
    "charge": 5,
    "refund": 8,
    "take_back": 3,
    "freeze": 3,
    "expire_grant": 4,
}
# A nano-credit a token, and thirds of it, so that rounding shows.
TERMS = PriceTerms(per_request=5, input=1_000_000, cached_input=333_333, output=2_666_667)


def grant(amount: int, *, expires_at: datetime | None = None, priority: int = 100) -> GrantCredits:
    return GrantCredits(
        WALLET, WALLET, f"key:{uuid7()}", "user:test", uuid7(), amount, "manual", "test", priority, expires_at
    )


def hold(
    worst: Usage,
    *,
    clamp: bool = False,
    ttl_ms: int = 30_000,
    model: str = MODEL,
    key_id: UUID | None = None,
    user_id: UUID | None = None,
) -> PlaceHold:
    return PlaceHold(WALLET, uuid7(), user_id, key_id, "default", model, worst, clamp, ttl_ms, "req")


def settle(hold_id: UUID, usage: Usage) -> Settle:
    return Settle(WALLET, hold_id, usage, "build", "stop", 12)


def figures(result: Result) -> tuple[int, ...]:
    """The numbers of a result, without ids and times."""
    if isinstance(result, Extended):
        return ()
    return tuple(v for v in astuple(result) if isinstance(v, int)) if result is not None else ()


def authored() -> tuple[UUID, UUID, str, str]:
    return WALLET, WALLET, f"key:{uuid7()}", "user:test"


@dataclass
class Pair:
    """Kernel and oracle side by side. `sources` are holds and charges of late, which may be refunded."""

    ledger: MemoryLedger
    oracle: Oracle
    now: datetime = START
    holds: list[UUID] = field(default_factory=list)
    charges: list[UUID] = field(default_factory=list)

    def passes(self, rng: random.Random) -> None:
        """Time does; now and then midnight or a month with it, or the clock is set back."""
        seconds = rng.choice((0, 0.005, 0.5, 9))
        if rng.random() < 0.02:
            seconds = rng.choice((-5, -7_200, -90_000, 7_200, 90_000, 20 * 86_400))
        self.now += timedelta(seconds=seconds)

    def budgets(self, rng: random.Random) -> None:
        """Somebody sets a budget, or removes one by setting it so high that it never refuses."""
        subject: Subject = rng.choice(("key", "member"))
        who = rng.choice(KEYS if subject == "key" else MEMBERS)
        limits: dict[Period, int] = {}
        for period in rng.sample(PERIODS, rng.randint(1, 2)):
            limits[period] = rng.choice((0, rng.randint(1, 3_000), 10**9))
        self.ledger.set_budget(subject, who, limits, self.now)
        self.oracle.set_budget(who, limits.get("day"), limits.get("month"), self.now)

    def both(self, op: Operation) -> Result | str:
        """Apply to both, and compare the answers and the sums."""
        expected: tuple[int, ...] | str
        actual: tuple[int, ...] | str
        result: Result | str = None
        try:
            expected = self.oracle.apply(op, self.now)
        except Refused as e:
            expected = str(e)
        before = self.ledger.fingerprint()
        try:
            result = self.ledger.apply(op, self.now)
            actual = figures(result)
        except TollgateError as e:
            result = actual = e.code
            assert self.ledger.fingerprint() == before, "a refusal changes nothing"
        assert actual == expected, (op, actual, expected)
        self.compare()
        return result

    def compare(self) -> None:
        book, oracle = self.ledger.book, self.oracle
        self.ledger.check()
        assert book.available(self.now) == oracle.available(self.now)
        assert book.owed == oracle.owed
        revenue = book.accounts["revenue"]
        assert revenue.credits_posted - revenue.debits_posted == oracle.spent
        assert book.accounts["breakage"].credits_posted == oracle.lapsed
        for pot in oracle.pots:
            account = book.grants[pot.id].account
            assert (account.left, account.free) == (pot.left, pot.free())
        assert book.is_frozen == oracle.frozen


def pair(terms: PriceTerms = TERMS) -> Pair:
    return Pair(MemoryLedger(WALLET, terms, START), Oracle(terms))


def random_usage(rng: random.Random, most: int) -> Usage:
    plain = rng.randint(0, most)
    return Usage(plain, rng.randint(0, plain), rng.choice((0, rng.randint(0, most))))


def random_operation(rng: random.Random, state: Pair) -> Operation:
    """Any operation, of a hold or a charge of late where it needs one."""
    del state.holds[:-RECENT]
    some = rng.choice(state.holds) if state.holds else uuid7()
    [kind] = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    match kind:
        case "grant":
            expiry = rng.choice((None, state.now + timedelta(seconds=rng.randint(-2, 90))))
            return grant(rng.randint(1, 3_000), expires_at=expiry, priority=rng.choice((10, 100)))
        case "hold":
            placed = hold(
                Usage(rng.randint(0, 300), 0, rng.randint(1, 40)),
                clamp=rng.random() < 0.5,
                ttl_ms=rng.randint(100, 60_000),
                key_id=rng.choice((None, *KEYS)),
                user_id=rng.choice((None, *MEMBERS)),
            )
            state.holds.append(placed.hold_id)
            return placed
        case "extend":
            return ExtendHold(WALLET, some, rng.randint(1, 1_000), rng.randint(0, 80))
        case "heartbeat":
            return Heartbeat(WALLET, some, random_usage(rng, 200), rng.randint(100, 60_000))
        case "settle":
            return settle(some, random_usage(rng, 400))
        case "void":
            return Void(WALLET, some, "test")
        case "expire":
            return ExpireHold(WALLET, some)
        case "charge":
            who = rng.choice((None, *MEMBERS)), rng.choice((None, *KEYS))
            charge = Charge(*authored(), uuid7(), rng.randint(1, 500), "test", *who)
            state.charges = [*state.charges[-RECENT:], charge.charge_id]
            return charge
        case "refund":
            source = rng.choice([*state.holds, *state.charges, uuid7()])
            return Refund(*authored(), source, uuid7(), rng.choice((None, rng.randint(1, 300))), "test")
        case "freeze":
            return Freeze(*authored(), rng.random() < 0.3, "test")
    granted = rng.choice(list(state.ledger.book.grants) or [uuid7()])
    if kind == "take_back":
        return TakeBack(*authored(), granted, rng.randint(1, 500), "test")
    return ExpireGrant(WALLET, granted)


def random_step(rng: random.Random, state: Pair) -> Operation | None:
    """What comes next, when it is no repetition of what came before: those have tests of their own."""
    state.passes(rng)
    if rng.random() < 0.03:
        state.budgets(rng)
    operation = random_operation(rng, state)
    return None if any(key in state.ledger.memory for key in operation.keys) else operation
