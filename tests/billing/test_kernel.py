"""The kernel against a naive model of the rules, and rule by rule."""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.domain import INT8_MAX, PriceTerms, Usage
from services.billing.errors import (
    AmountTooLarge,
    CreditsReserved,
    HoldResolved,
    IdempotencyMismatch,
    InsufficientCredits,
    ModelNotPriced,
    WalletFrozen,
)
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
from services.billing.ledger.results import Extended, Held, HoldExtended, Result, Settled
from shared.errors import TollgateError
from shared.ids import uuid7
from tests.billing.memory import MODEL, MemoryLedger
from tests.billing.oracle import Oracle, Refused

START = datetime(2026, 1, 1, tzinfo=UTC)
WALLET = UUID(int=7)
CREDIT = 10**9
# A nano-credit a token, and thirds of it, so that rounding shows.
TERMS = PriceTerms(per_request=5, input=1_000_000, cached_input=333_333, output=2_666_667)
OPERATIONS = 20_000
SEED = 20_260_101


def grant(amount: int, *, expires_at: datetime | None = None, priority: int = 100) -> GrantCredits:
    return GrantCredits(
        WALLET, WALLET, f"key:{uuid7()}", "user:test", uuid7(), amount, "manual", "test", priority, expires_at
    )


def hold(worst: Usage, *, clamp: bool = False, ttl_ms: int = 30_000, model: str = MODEL) -> PlaceHold:
    return PlaceHold(WALLET, uuid7(), None, None, "default", model, worst, clamp, ttl_ms, "req")


def settle(hold_id: UUID, usage: Usage) -> Settle:
    return Settle(WALLET, hold_id, usage, "build", "stop", 12)


def figures(result: Result) -> tuple[int, ...]:
    """The numbers of a result, without ids and times."""
    if isinstance(result, Extended):
        return ()
    return tuple(v for v in astuple(result) if isinstance(v, int)) if result is not None else ()


@dataclass
class Pair:
    """Kernel and oracle side by side."""

    ledger: MemoryLedger
    oracle: Oracle
    now: datetime = START

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
        assert book.accounts["revenue"].credits_posted == oracle.spent
        assert book.accounts["breakage"].credits_posted == oracle.lapsed
        for pot in oracle.pots:
            account = book.grants[pot.id].account
            assert (account.left, account.free) == (pot.left, pot.free())


def pair(terms: PriceTerms = TERMS) -> Pair:
    return Pair(MemoryLedger(WALLET, terms, START), Oracle(terms))


def random_usage(rng: random.Random, most: int) -> Usage:
    plain = rng.randint(0, most)
    return Usage(plain, rng.randint(0, plain), rng.choice((0, rng.randint(0, most))))


def random_operation(rng: random.Random, state: Pair, holds: list[UUID]) -> Operation:
    choice = rng.random()
    some = rng.choice(holds) if holds else uuid7()
    if choice < 0.10:
        expiry = rng.choice((None, state.now + timedelta(seconds=rng.randint(-2, 90))))
        return grant(rng.randint(1, 3_000), expires_at=expiry, priority=rng.choice((10, 100)))
    if choice < 0.45:
        placed = hold(
            Usage(rng.randint(0, 300), 0, rng.randint(1, 40)),
            clamp=rng.random() < 0.5,
            ttl_ms=rng.randint(100, 60_000),
        )
        holds.append(placed.hold_id)
        return placed
    if choice < 0.53:
        return ExtendHold(WALLET, some, rng.randint(1, 1_000), rng.randint(0, 80))
    if choice < 0.63:
        return Heartbeat(WALLET, some, random_usage(rng, 200), rng.randint(100, 60_000))
    if choice < 0.80:
        return settle(some, random_usage(rng, 400))
    if choice < 0.86:
        return Void(WALLET, some, "test")
    if choice < 0.96:
        return ExpireHold(WALLET, some)
    grants = list(state.ledger.book.grants)
    return ExpireGrant(WALLET, rng.choice(grants) if grants else uuid7())


def test_the_kernel_does_what_a_naive_model_of_the_rules_does() -> None:
    rng = random.Random(SEED)
    refusals: dict[str, int] = {}
    outcomes: list[Result | str] = []
    applied = 0
    while applied < OPERATIONS:
        state = pair()
        holds: list[UUID] = []
        for _ in range(200):
            state.now += timedelta(milliseconds=rng.choice((0, 5, 500, 9_000)))
            operation = random_operation(rng, state, holds)
            del holds[:-25]
            if any(key in state.ledger.memory for key in operation.keys):
                continue
            outcome = state.both(operation)
            outcomes.append(outcome)
            applied += 1
            if isinstance(outcome, str):
                refusals[outcome] = refusals.get(outcome, 0) + 1
    for code in ("insufficient_quota", "credits_reserved", "hold_resolved", "hold_not_expired", "expiry_in_past"):
        assert refusals.get(code, 0) > 20, (code, refusals)
    assert sum(isinstance(outcome, HoldExtended) for outcome in outcomes) > 100


@st.composite
def cheap_terms(draw: st.DrawFn) -> PriceTerms:
    price = st.integers(0, 3_000_000)
    plain = draw(price)
    return PriceTerms(draw(st.integers(0, 20)), plain, draw(st.integers(0, plain)), draw(price))


@settings(max_examples=60, deadline=None)
@given(cheap_terms(), st.integers(0, 2**32), st.integers(1, 60))
def test_the_kernel_does_so_at_any_price(terms: PriceTerms, seed: int, steps: int) -> None:
    rng, state = random.Random(seed), pair(terms)
    holds: list[UUID] = []
    for _ in range(steps):
        state.now += timedelta(milliseconds=rng.choice((0, 700, 20_000)))
        operation = random_operation(rng, state, holds)
        if not any(key in state.ledger.memory for key in operation.keys):
            state.both(operation)


def test_grants_are_drawn_by_priority_then_expiry_then_age() -> None:
    state = pair(PriceTerms(0, 0, 0, 1_000_000))
    late, soon = START + timedelta(days=9), START + timedelta(days=2)
    plan = [
        replace(grant(10, priority=100), account_id=uuid7(1)),
        replace(grant(10, priority=100), account_id=uuid7(2)),
        grant(10, priority=100, expires_at=late),
        grant(10, priority=100, expires_at=soon),
        grant(10, priority=1),
    ]
    for operation in plan:
        state.both(operation)
    placed = state.both(hold(Usage(0, 0, 45)))
    assert isinstance(placed, Held)
    slices = state.ledger.book.holds[placed.hold_id].slices
    expected = [(4, 10), (3, 10), (2, 10), (0, 10), (1, 5)]
    assert [(s.account_id, s.amount) for s in slices] == [(plan[i].account_id, n) for i, n in expected]


def test_no_credits_and_reserved_credits_are_different_refusals() -> None:
    state = pair(PriceTerms(0, 0, 0, 1_000_000))
    ledger = state.ledger
    with pytest.raises(InsufficientCredits):
        ledger.apply(hold(Usage(0, 0, 1)), START)
    ledger.apply(grant(100), START)
    ledger.apply(hold(Usage(0, 0, 60)), START)
    with pytest.raises(CreditsReserved) as reserved:
        ledger.apply(hold(Usage(0, 0, 60)), START)
    assert reserved.value.status == 402
    with pytest.raises(InsufficientCredits):
        ledger.apply(hold(Usage(0, 0, 101)), START)
    clamped = ledger.apply(hold(Usage(0, 0, 101), clamp=True), START)
    assert isinstance(clamped, Held)
    assert clamped.output_tokens == 40


def test_an_over_run_is_owed_and_blocks_until_new_credits_paid_it() -> None:
    state = pair(PriceTerms(0, 0, 0, 1_000_000))
    state.both(grant(100))
    placed = state.both(hold(Usage(0, 0, 50)))
    assert isinstance(placed, Held)
    settled = state.both(settle(placed.hold_id, Usage(0, 0, 130)))
    assert settled == Settled(cost=130, settled=100, receivable=30, available=0)
    assert state.both(hold(Usage(0, 0, 1))) == "insufficient_quota"
    state.both(grant(20))
    assert state.ledger.book.owed == 10
    state.both(grant(20))
    assert (state.ledger.book.owed, state.ledger.book.available(state.now)) == (0, 10)


def test_what_is_released_while_something_is_owed_pays_it() -> None:
    state = pair(PriceTerms(0, 0, 0, 1_000_000))
    state.both(grant(100))
    one, two = state.both(hold(Usage(0, 0, 40))), state.both(hold(Usage(0, 0, 60)))
    assert isinstance(one, Held)
    assert isinstance(two, Held)
    state.both(settle(one.hold_id, Usage(0, 0, 70)))
    assert state.ledger.book.owed == 30
    state.both(Void(WALLET, two.hold_id, "failed"))
    assert (state.ledger.book.owed, state.ledger.book.available(state.now)) == (0, 30)


def test_a_grant_that_expires_under_a_hold_pays_the_hold_and_lapses_with_its_release() -> None:
    state = pair(PriceTerms(0, 0, 0, 1_000_000))
    operation = grant(100, expires_at=START + timedelta(seconds=5))
    state.both(operation)
    placed = state.both(hold(Usage(0, 0, 60)))
    assert isinstance(placed, Held)
    state.now = START + timedelta(seconds=6)
    state.both(ExpireGrant(WALLET, operation.account_id))
    assert state.oracle.lapsed == 40
    settled = state.both(settle(placed.hold_id, Usage(0, 0, 25)))
    assert settled == Settled(cost=25, settled=25, receivable=0, available=0)
    assert state.oracle.lapsed == 75


def test_an_expired_hold_pays_its_last_heartbeat_and_a_late_settlement_only_the_remainder() -> None:
    state = pair(PriceTerms(0, 0, 0, 1_000_000))
    state.both(grant(100))
    placed = state.both(hold(Usage(0, 0, 60), ttl_ms=1_000))
    assert isinstance(placed, Held)
    state.both(Heartbeat(WALLET, placed.hold_id, Usage(0, 0, 30), 1_000))
    state.both(Heartbeat(WALLET, placed.hold_id, Usage(0, 0, 20), 1_000))  # usage never shrinks
    assert state.both(ExpireHold(WALLET, placed.hold_id)) == "hold_not_expired"
    state.now += timedelta(seconds=2)
    assert state.both(ExpireHold(WALLET, placed.hold_id)) == Settled(30, 30, 0, 70)
    late = state.both(settle(placed.hold_id, Usage(0, 0, 45)))
    assert late == Settled(cost=45, settled=15, receivable=0, available=55)
    assert [u.part for rows in state.ledger.written for u in rows.usages] == [0, 1]
    assert [t.code for t in state.ledger.written[-1].transfers] == ["late"]


def test_a_hold_that_expires_with_nothing_produced_costs_nothing() -> None:
    state = pair()
    state.both(grant(CREDIT))
    placed = state.both(hold(Usage(100, 0, 60), ttl_ms=1_000))
    assert isinstance(placed, Held)
    state.both(Heartbeat(WALLET, placed.hold_id, Usage(100, 0, 0), 1_000))
    state.now += timedelta(seconds=5)
    assert state.both(ExpireHold(WALLET, placed.hold_id)) == Settled(0, 0, 0, CREDIT)


def test_a_late_settlement_of_no_tokens_records_what_it_charges_for_the_request() -> None:
    state = pair()
    state.both(grant(CREDIT))
    placed = state.both(hold(Usage(100, 0, 60), ttl_ms=1_000))
    assert isinstance(placed, Held)
    state.now += timedelta(seconds=5)
    assert state.both(ExpireHold(WALLET, placed.hold_id)) == Settled(0, 0, 0, CREDIT)
    late = state.both(settle(placed.hold_id, Usage()))
    assert late == Settled(TERMS.per_request, TERMS.per_request, 0, CREDIT - TERMS.per_request)
    [part] = state.ledger.written[-1].usages
    assert (part.part, part.input_tokens, part.output_tokens, part.cost) == (1, 0, 0, TERMS.per_request)


def test_the_first_resolution_stands() -> None:
    ledger = pair().ledger
    ledger.apply(grant(CREDIT), START)
    placed = ledger.apply(hold(Usage(1, 0, 1)), START)
    assert isinstance(placed, Held)
    first = ledger.apply(settle(placed.hold_id, Usage(1, 0, 1)), START)
    assert ledger.apply(settle(placed.hold_id, Usage(1, 0, 1)), START) is first
    with pytest.raises(HoldResolved):
        ledger.apply(Void(WALLET, placed.hold_id, "late"), START)
    with pytest.raises(IdempotencyMismatch):
        ledger.apply(settle(placed.hold_id, Usage(1, 0, 2)), START)


def test_amounts_that_no_counter_can_hold_are_refused_and_change_nothing() -> None:
    ledger = pair(PriceTerms(0, 0, 0, 10**16)).ledger
    ledger.apply(grant(INT8_MAX - 5), START)
    with pytest.raises(AmountTooLarge):
        ledger.apply(grant(6), START)
    with pytest.raises(AmountTooLarge):
        ledger.apply(hold(Usage(0, 0, 10**9)), START)
    placed = ledger.apply(hold(Usage(0, 0, 9_000)), START)
    assert isinstance(placed, Held)
    for too_much in (
        settle(placed.hold_id, Usage(0, 0, 10**9)),
        Heartbeat(WALLET, placed.hold_id, Usage(0, 0, 10**9), 1_000),
    ):
        with pytest.raises(AmountTooLarge):
            ledger.apply(too_much, START)
    ledger.apply(settle(placed.hold_id, Usage(0, 0, 8_000)), START)
    ledger.check()


def test_a_frozen_wallet_and_a_model_without_a_price_are_refused() -> None:
    ledger = pair().ledger
    ledger.apply(grant(CREDIT), START)
    with pytest.raises(ModelNotPriced):
        ledger.apply(hold(Usage(1, 0, 1), model="other"), START)
    ledger.book.is_frozen = True
    with pytest.raises(WalletFrozen):
        ledger.apply(hold(Usage(1, 0, 1)), START)
