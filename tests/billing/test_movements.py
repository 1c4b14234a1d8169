"""Credits in and out of a wallet without a hold: charges, and refunds in the reverse order of what was taken."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest

from services.billing.domain import PriceTerms, Usage
from services.billing.errors import AmountTooLarge, InsufficientCredits, NothingToRefund, RefundTooLarge
from services.billing.ledger.book import Draw
from services.billing.ledger.operations import Charge, ExpireHold, Heartbeat, Refund
from services.billing.ledger.results import Charged, Held, Refunded
from shared.ids import uuid7
from tests.billing.memory import MemoryLedger
from tests.billing.side_by_side import START, WALLET, grant, hold, pair, settle


def taken_by(ledger: MemoryLedger, source_id: UUID) -> list[Draw]:
    """The transfers of a hold or a charge, as the writer loads them for a refund."""
    revenue = ledger.book.accounts["revenue"].id
    transfers = [t for rows in ledger.written for t in rows.transfers if t.hold_id == source_id]
    return [
        Draw(t.credit_account if t.debit_account == revenue else t.debit_account, t.amount, t.code) for t in transfers
    ]


def refunded(ledger: MemoryLedger, source_id: UUID, amount: int | None) -> Refunded:
    ledger.book.draws[source_id] = taken_by(ledger, source_id)
    operation = Refund(WALLET, WALLET, f"key:{uuid7()}", "user:test", source_id, uuid7(), amount, "test")
    result = ledger.apply(operation, START)
    assert isinstance(result, Refunded)
    return result


def test_a_refund_goes_back_to_where_it_came_from_the_last_draw_first() -> None:
    ledger = pair(PriceTerms(0, 0, 0, 1_000_000)).ledger
    first, second = grant(10, priority=1), grant(20)
    for credit in (first, second):
        ledger.apply(credit, START)
    placed = ledger.apply(hold(Usage(0, 0, 25)), START)
    assert isinstance(placed, Held)
    ledger.apply(settle(placed.hold_id, Usage(0, 0, 25)), START)
    left = [ledger.book.grants[credit.account_id].account for credit in (first, second)]
    assert refunded(ledger, placed.hold_id, 8) == Refunded(8, 17, 0, 13)
    assert [account.left for account in left] == [0, 13]
    with pytest.raises(RefundTooLarge):
        refunded(ledger, placed.hold_id, 18)
    assert refunded(ledger, placed.hold_id, None) == Refunded(17, 0, 0, 30)
    assert [account.left for account in left] == [10, 20]
    with pytest.raises(NothingToRefund):
        refunded(ledger, placed.hold_id, 1)


def test_a_refund_before_a_late_settlement_is_no_refund_of_what_that_took() -> None:
    ledger = pair(PriceTerms(0, 0, 0, 1_000_000)).ledger
    first, second = grant(20, priority=1), grant(20)
    for credit in (first, second):
        ledger.apply(credit, START)
    left = [ledger.book.grants[credit.account_id].account for credit in (first, second)]
    placed = ledger.apply(hold(Usage(0, 0, 20), ttl_ms=1_000), START)
    assert isinstance(placed, Held)
    ledger.apply(Heartbeat(WALLET, placed.hold_id, Usage(0, 0, 20), 1_000), START)
    later = START + timedelta(seconds=2)
    ledger.apply(ExpireHold(WALLET, placed.hold_id), later)
    assert refunded(ledger, placed.hold_id, 10) == Refunded(10, 10, 0, 30)
    charge = Charge(WALLET, WALLET, "key:charge", "user:test", uuid7(), 10, "test")
    ledger.apply(charge, later)
    ledger.apply(settle(placed.hold_id, Usage(0, 0, 35)), later)
    assert [account.left for account in left] == [0, 5]
    assert refunded(ledger, placed.hold_id, None) == Refunded(25, 0, 0, 30)
    assert [account.left for account in left] == [10, 20]


def test_a_refund_forgives_a_debt_before_it_gives_credits_and_paid_debts_come_back_as_a_grant() -> None:
    ledger = pair(PriceTerms(0, 0, 0, 1_000_000)).ledger
    ledger.apply(grant(50), START)
    placed = ledger.apply(hold(Usage(0, 0, 50)), START)
    assert isinstance(placed, Held)
    ledger.apply(settle(placed.hold_id, Usage(0, 0, 90)), START)
    assert ledger.book.owed == 40
    assert refunded(ledger, placed.hold_id, 10) == Refunded(10, 80, 30, 0)
    ledger.apply(grant(30), START)
    assert (ledger.book.owed, ledger.book.balance) == (0, 0)
    assert refunded(ledger, placed.hold_id, 80) == Refunded(80, 0, 0, 80)
    assert ledger.book.balance == 80


def test_a_charge_is_taken_whole_or_not_at_all_and_can_be_refunded() -> None:
    ledger = pair().ledger
    ledger.apply(grant(100), START)

    def charge(amount: int) -> Charge:
        return Charge(WALLET, WALLET, f"key:{uuid7()}", "user:test", uuid7(), amount, "test")

    taken = charge(60)
    assert ledger.apply(taken, START) == Charged(taken.charge_id, 60, 40)
    for too_much in (charge(41), charge(0)):
        with pytest.raises((InsufficientCredits, AmountTooLarge)):
            ledger.apply(too_much, START)
    ledger.check()
    assert refunded(ledger, taken.charge_id, None) == Refunded(60, 0, 0, 100)
