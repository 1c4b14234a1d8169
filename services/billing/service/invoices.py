"""Invoices: one a month (UTC) and wallet, whose lines are the ledger's transfers to the nano-credit.

A month is closed an hour after its end. Its invoice is made when somebody first asks for it or for a later one, and
then never changes; invoices take a wallet's transfers by their numbers, each where the one before stopped, so that all
of them together are the whole ledger. One that would not add up is not issued.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from uuid import UUID

from services.billing.errors import InvoiceNotFound
from services.billing.repository import invoices as repository
from services.billing.repository.database import Connection, Database
from services.billing.repository.invoices import Invoice, InvoiceLine
from services.billing.repository.wallets import seq_before
from shared.clock import Clock
from shared.errors import Internal
from shared.ids import uuid7

CLOSES_AFTER = timedelta(hours=1)  # longer than clocks differ and operations take
MONTHS_AT_ONCE = 24
USED = ("usage", "charge", "refund")


@dataclass(frozen=True, slots=True)
class InvoiceView:
    """An invoice with its lines; one without `issued_at` is a draft of a month that is not over."""

    invoice: Invoice
    lines: list[InvoiceLine]


class Invoices:
    """One for the life of the process."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def page(self, org_id: UUID, *, before: date | None, limit: int) -> tuple[list[Invoice], date | None]:
        """Issued ones, newest first, and where the next page begins; None at the end."""
        await self._issue(org_id, self._last_closed())
        rows = await repository.page(self._database, org_id, before, limit + 1)
        return rows[:limit], rows[limit - 1].month if len(rows) > limit else None

    async def get(self, org_id: UUID, month: date) -> InvoiceView:
        """Of a month, given by its first day; a draft while it is not closed. Raises InvoiceNotFound."""
        closed = self._last_closed()
        await self._issue(org_id, min(month, closed))
        if month <= closed:
            found = await repository.find(self._database, org_id, month)
            if found is None:
                raise InvoiceNotFound()
            return InvoiceView(*found)
        if month > _first_of_month(self._clock.now()):
            raise InvoiceNotFound()
        newest = await repository.newest(self._database, org_id)
        after = await self._seq_before(org_id, month)
        if month == _following(closed):
            after = max(after, newest.until_seq if newest else 0)
        until = max(after, await self._seq_before(org_id, _following(month)))
        return await self._database.transaction(lambda c: _computed(c, org_id, month, after, until))

    async def _issue(self, org_id: UUID, through: date) -> None:
        """Every invoice up to a month that is closed, in order; a bounded number at a time."""
        for _ in range(MONTHS_AT_ONCE):
            newest = await repository.newest(self._database, org_id)
            if newest is not None and newest.month >= through:
                return
            opened = await self._database.transaction(lambda c: repository.wait_for_writers(c, org_id))
            if opened is None:
                return
            month = _first_of_month(opened) if newest is None else _following(newest.month)
            if month > through:
                return
            await self._issue_month(org_id, month, newest.until_seq if newest else 0)

    async def _issue_month(self, org_id: UUID, month: date, after: int) -> None:
        until = max(after, await self._seq_before(org_id, _following(month)))

        async def work(connection: Connection) -> None:
            view = await _computed(connection, org_id, month, after, until)
            await repository.insert(connection, view.invoice, view.lines)

        await self._database.transaction(work)

    async def _seq_before(self, org_id: UUID, day: date) -> int:
        return await seq_before(self._database, org_id, datetime.combine(day, time(), UTC))

    def _last_closed(self) -> date:
        this_month = _first_of_month(self._clock.now() - CLOSES_AFTER)
        return _first_of_month(this_month - timedelta(days=1))


async def _computed(connection: Connection, org_id: UUID, month: date, after: int, until: int) -> InvoiceView:
    lines = await repository.lines(connection, org_id, after, until)
    opening = await repository.balance_at_seq(connection, org_id, after)
    closing = await repository.balance_at_seq(connection, org_id, until)
    if opening + sum(line.effect for line in lines) != closing:
        raise Internal(code="invoice_does_not_add_up", detail=f"wallet {org_id}, {month}: transfers {after} to {until}")
    total = sum(-line.amount if line.kind == "refund" else line.amount for line in lines if line.kind in USED)
    return InvoiceView(Invoice(uuid7(), org_id, month, after, until, opening, closing, total, None), lines)


def _first_of_month(day: date) -> date:
    return date(day.year, day.month, 1)


def _following(month: date) -> date:
    return _first_of_month(month + timedelta(days=31))
