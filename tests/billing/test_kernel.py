"""The kernel against a naive model of the rules, and rule by rule."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import timedelta

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
    Heartbeat,
    Void,
)
from services.billing.ledger.results import Held, Settled
from shared.ids import uuid7
from tests.billing.side_by_side import CREDIT, START, TERMS, WALLET, WEIGHTS, grant, hold, pair, random_step, settle

OPERATIONS = 20_000
SEED = 20_260_101


def test_the_kernel_does_what_a_naive_model_of_the_rules_does() -> None:
    rng = random.Random(SEED)
    seen: Counter[str] = Counter()
    while seen.total() < OPERATIONS:
        state = pair()
        for _ in range(200):
            operation = random_step(rng, state)
            if operation is not None:
                outcome = state.both(operation)
                seen[outcome if isinstance(outcome, str) else operation.kind] += 1
    for refusal in (
        "insufficient_quota",
        "credits_reserved",
        "budget_exceeded",
        "wallet_frozen",
        "hold_resolved",
        "hold_not_expired",
        "expiry_in_past",
        "nothing_to_refund",
        "refund_too_large",
    ):
        assert seen[refusal] > 20, (refusal, seen)
    for kind in WEIGHTS:
        assert seen[kind] > 20, (kind, seen)


@st.composite
def cheap_terms(draw: st.DrawFn) -> PriceTerms:
    price = st.integers(0, 3_000_000)
    plain = draw(price)
    return PriceTerms(draw(st.integers(0, 20)), plain, draw(st.integers(0, plain)), draw(price))


@settings(max_examples=60, deadline=None)
@given(cheap_terms(), st.integers(0, 2**32), st.integers(1, 60))
def test_the_kernel_does_so_at_any_price(terms: PriceTerms, seed: int, steps: int) -> None:
    rng, state = random.Random(seed), pair(terms)
    for _ in range(steps):
        operation = random_step(rng, state)
        if operation is not None:
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
