"""Invoices equal the ledger to the nano-credit, follow each other without a gap, and never change."""

from __future__ import annotations

import asyncio
import itertools
import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest

from services.billing.domain import PriceTerms
from services.billing.errors import InvoiceNotFound
from services.billing.ledger.operations import OpenWallet
from services.billing.service import Author, Invoices
from services.billing.service.invoices import InvoiceView
from shared.clock import FixedClock
from shared.errors import Internal
from tests.billing.harness import SIGNUP_NANO, App, Ledger, grant, person, place, settle, signed

INVOICES = "/api/v1/billing/invoices"


def month_of(moment: datetime) -> date:
    return date(moment.year, moment.month, 1)


def months_later(month: date, months: int) -> date:
    for _ in range(months):
        month = (month + timedelta(days=31)).replace(day=1)
    return month


def at(month: date, day: int = 2) -> FixedClock:
    return FixedClock(datetime(month.year, month.month, day, tzinfo=UTC))


async def busy(ledger: Ledger, org_id: UUID, seed: int) -> None:
    """Grants, requests of two models and prices, a debt and its repayment."""
    rng, models = random.Random(seed), [f"m-{uuid4().hex[:8]}" for _ in range(2)]
    await ledger.writer.submit(OpenWallet(org_id, uuid4()))
    for number in range(24):
        if number % 12 == 0:
            for model in models:
                terms = PriceTerms(rng.randint(0, 5), 7_000_000, 1_300_001, rng.randint(10**6, 10**7) + 1)
                author = Author(uuid4(), uuid4(), None, uuid4().hex)
                await ledger.prices.publish(author, model, "default", terms, None)
        placed = place(org_id, rng.randint(1, 9), model=rng.choice(models))
        try:
            await ledger.writer.submit(placed)
        except Exception:  # noqa: BLE001 - out of credits: a refusal is no transfer
            await ledger.writer.submit(grant(org_id, rng.randint(500, 900)))
            continue
        await ledger.writer.submit(settle(org_id, placed.hold_id, rng.randint(1, 14)))
    held = await ledger.held(org_id, 1, clamp=True)
    await ledger.writer.submit(settle(org_id, held.hold_id, 5_000))
    await ledger.writer.submit(grant(org_id, 9_000))


async def moved_to(ledger: Ledger, org_id: UUID, month: date, transfers: int) -> None:
    """More of the same in a later month: grants, by hand."""
    begins = datetime(month.year, month.month, 3, tzinfo=UTC)
    await ledger.pool.execute(
        """INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount,
            code, balance_after, effective_at, booked_at)
        SELECT gen_random_uuid(), t.op_id, t.wallet_id, t.wallet_seq + n, f.debit_account, f.credit_account, 3,
            'grant', t.balance_after + 3 * n, t.effective_at, $2::timestamptz + n * interval '1 hour'
        FROM billing.transfer t
        JOIN billing.transfer f ON f.wallet_id = t.wallet_id AND f.wallet_seq = 1
        CROSS JOIN generate_series(1, $3::int8) n
        WHERE t.wallet_id = $1 AND t.wallet_seq = (SELECT seq FROM billing.wallet WHERE id = $1)""",
        org_id,
        begins,
        transfers,
    )
    await ledger.pool.execute("UPDATE billing.wallet SET seq = seq + $2 WHERE id = $1", org_id, transfers)


async def sums(ledger: Ledger, org_id: UUID) -> dict[str, int]:
    rows = await ledger.pool.fetch(
        "SELECT code, sum(amount)::int8 FROM billing.transfer WHERE wallet_id = $1 GROUP BY code", org_id
    )
    return {row[0]: row[1] for row in rows}


def by_kind(views: list[InvoiceView]) -> dict[str, int]:
    found: dict[str, int] = {}
    for view in views:
        for line in view.lines:
            found[line.kind] = found.get(line.kind, 0) + line.amount
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_the_lines_equal_the_ledger_to_the_nano(ledger: Ledger, org_id: UUID, seed: int) -> None:
    await busy(ledger, org_id, seed)
    this_month = month_of(datetime.now(UTC))
    invoices = Invoices(ledger.database, at(months_later(this_month, 1)))
    view = await invoices.get(org_id, this_month)
    ledgers = await sums(ledger, org_id)
    used = sum(ledgers.pop(code, 0) for code in ("usage", "late", "receivable"))
    assert by_kind([view]) == {"usage": used} | ledgers
    assert view.invoice.total == used == (await ledger.wallet(org_id)).spent
    assert (view.invoice.opening, view.invoice.closing) == (0, (await ledger.wallet(org_id)).balance)
    usage = [line for line in view.lines if line.kind == "usage"]
    assert len(usage) >= 4, "two models, two prices each"
    rows = await ledger.pool.fetch(
        """SELECT model, price_id, sum(output_tokens)::int8 AS tokens, sum(cost)::int8 AS cost, count(*) AS requests
        FROM billing.usage WHERE wallet_id = $1 GROUP BY model, price_id""",
        org_id,
    )
    expected = {(r["model"], r["price_id"]): (r["requests"], r["tokens"], r["cost"]) for r in rows if r["cost"]}
    assert {(u.model, u.price_id): (u.count, u.output_tokens, u.amount) for u in usage} == expected


async def test_invoices_of_all_months_are_the_whole_ledger_and_never_change(ledger: Ledger, org_id: UUID) -> None:
    await busy(ledger, org_id, 7)
    first = month_of(datetime.now(UTC))
    for later, transfers in ((1, 5), (3, 2)):
        await moved_to(ledger, org_id, months_later(first, later), transfers)
    invoices = Invoices(ledger.database, at(months_later(first, 4)))
    listed, _ = await invoices.page(org_id, before=None, limit=10)
    views = [await invoices.get(org_id, invoice.month) for invoice in reversed(listed)]
    assert [view.invoice.month for view in views] == [months_later(first, n) for n in range(4)]
    ranges = [(view.invoice.after_seq, view.invoice.until_seq) for view in views]
    assert ranges[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert ranges[-1][1] == await ledger.pool.fetchval("SELECT seq FROM billing.wallet WHERE id = $1", org_id)
    ledgers = await sums(ledger, org_id)
    used = sum(ledgers.pop(code, 0) for code in ("usage", "late", "receivable"))
    assert by_kind(views) == {"usage": used} | ledgers
    await moved_to(ledger, org_id, months_later(first, 3), 1)  # booked late: it belongs to the next invoice
    again = Invoices(ledger.database, at(months_later(first, 5)))
    assert [await again.get(org_id, view.invoice.month) for view in views] == views
    late = await again.get(org_id, months_later(first, 4))
    assert (late.invoice.until_seq - late.invoice.after_seq, late.lines[0].amount) == (1, 3)


async def test_a_month_is_closed_an_hour_after_its_end(ledger: Ledger, org_id: UUID) -> None:
    await ledger.writer.submit(OpenWallet(org_id, uuid4()))
    this_month = month_of(datetime.now(UTC))
    clock = at(months_later(this_month, 1), day=1)
    clock.advance(30 * 60)
    invoices = Invoices(ledger.database, clock)
    assert (await invoices.get(org_id, this_month)).invoice.issued_at is None
    assert (await invoices.get(org_id, months_later(this_month, 1))).invoice.closing == SIGNUP_NANO
    assert await invoices.page(org_id, before=None, limit=5) == ([], None)
    clock.advance(31 * 60)
    assert (await invoices.get(org_id, this_month)).invoice.issued_at is not None


async def test_many_who_ask_at_once_get_the_same_invoice(ledger: Ledger, org_id: UUID) -> None:
    await busy(ledger, org_id, 5)
    this_month = month_of(datetime.now(UTC))
    rivals = [Invoices(ledger.database, at(months_later(this_month, 2))) for _ in range(6)]
    views = await asyncio.gather(*(rival.get(org_id, this_month) for rival in rivals))
    assert len({view.invoice.id for view in views}) == 1
    assert await ledger.pool.fetchval("SELECT count(*) FROM billing.invoice WHERE wallet_id = $1", org_id) == 1


async def test_an_invoice_that_does_not_add_up_is_not_issued(ledger: Ledger, org_id: UUID) -> None:
    await ledger.writer.submit(OpenWallet(org_id, uuid4()))
    this_month = month_of(datetime.now(UTC))
    await moved_to(ledger, org_id, this_month, 1)
    await ledger.pool.execute(
        """INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount,
            code, balance_after, effective_at, booked_at)
        SELECT gen_random_uuid(), op_id, wallet_id, 3, debit_account, credit_account, 5, 'grant', 1, now(), now()
        FROM billing.transfer WHERE wallet_id = $1 AND wallet_seq = 1""",
        org_id,
    )
    await ledger.pool.execute("UPDATE billing.wallet SET seq = 3 WHERE id = $1", org_id)
    with pytest.raises(Internal) as refused:
        await Invoices(ledger.database, at(months_later(this_month, 2))).get(org_id, this_month)
    assert refused.value.code == "invoice_does_not_add_up"


async def test_there_are_no_invoices_of_the_future_nor_before_the_wallet(ledger: Ledger, org_id: UUID) -> None:
    this_month = month_of(datetime.now(UTC))
    invoices = Invoices(ledger.database, at(this_month, day=20))
    with pytest.raises(InvoiceNotFound):
        await invoices.get(org_id, months_later(this_month, 1))
    with pytest.raises(InvoiceNotFound):
        await invoices.get(org_id, date(2020, 1, 1))
    assert await invoices.page(org_id, before=None, limit=5) == ([], None)


async def test_customers_read_their_own_draft(app: App, ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, 100)
    await ledger.writer.submit(settle(org_id, held.hold_id, 40))
    month = f"{datetime.now(UTC):%Y-%m}"
    body: dict[str, Any] = (await app.http.get(f"{INVOICES}/{month}", headers=signed(person(org_id)))).json()
    assert (body["status"], body["opening"], body["closing"], body["total"]) == (
        "draft",
        "0.00",
        "0.00000096",
        "0.00000004",
    )
    assert [(line["kind"], line["source"], line["effect"]) for line in body["lines"]] == [
        ("grant", "signup", "0.000001"),
        ("usage", None, "-0.00000004"),
    ]
    assert sum(Decimal(line["effect"]) for line in body["lines"]) == Decimal(body["closing"])
    stranger = (await app.http.get(f"{INVOICES}/{month}", headers=signed(person()))).json()
    assert stranger["lines"] == []
    assert (await app.http.get(INVOICES, headers=signed(person(org_id)))).json() == {"data": [], "next_cursor": None}
    for wrong in ("2026-13", "2026-1", "last"):
        assert (await app.http.get(f"{INVOICES}/{wrong}", headers=signed(person(org_id)))).status_code == 400
