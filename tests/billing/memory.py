"""The kernel on a book in memory: what the writer does, without a database."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from uuid import UUID

from services.billing.domain import DEFAULT_CLASS, Price, PriceTerms
from services.billing.errors import IdempotencyMismatch
from services.billing.ledger import kernel
from services.billing.ledger.batch import Ids
from services.billing.ledger.book import Account, Book, Draw, Journal
from services.billing.ledger.operations import Operation, Refund, TakeBack
from services.billing.ledger.results import Result
from services.billing.ledger.rows import ChargeDay, Rollup, Rows, Transfer
from services.billing.ledger.spending import Period, Spending, Subject
from shared.errors import TollgateError
from shared.ids import uuid7

MODEL = "chat-mini"


class MemoryLedger:
    """One wallet, one price; every row that was ever written."""

    def __init__(self, wallet_id: UUID, terms: PriceTerms, now: datetime) -> None:
        published = now - timedelta(days=1_000)  # the clock may be set back
        self.prices = {(MODEL, DEFAULT_CLASS): [Price(uuid7(), MODEL, DEFAULT_CLASS, terms, published)]}
        self.book = Book(wallet_id)
        self.book.open(self.journal(now))
        self.written: list[Rows] = []
        self.transfers: list[Transfer] = []
        self.moved: Counter[str] = Counter()
        self.memory: dict[str, tuple[bytes, Result | TollgateError]] = {}

    def journal(self, now: datetime) -> Journal:
        ids = Ids()
        return Journal(now, ids, self.prices, ids())

    def apply(self, operation: Operation, now: datetime, journal: Journal | None = None) -> Result:
        """In a batch of its own, unless it is given one."""
        for key in operation.keys if operation.remembered else ():
            if key in self.memory:
                digest, outcome = self.memory[key]
                if digest != operation.body_sha256():
                    raise IdempotencyMismatch()
                if isinstance(outcome, TollgateError):
                    raise outcome
                return outcome
        batch = journal or self.journal(now)
        if journal is None:
            self.look_up(operation)
        key = operation.keys[int(kernel.is_late(self.book, operation))]
        try:
            result = kernel.decide(batch, self.book, operation)
        except TollgateError:
            assert journal is not None or batch.rows == Rows(), "a refusal writes nothing"
            raise
        self.memory[key] = (operation.body_sha256(), result)
        if journal is None:
            self.wrote(batch.rows)
        return result

    def wrote(self, rows: Rows) -> None:
        """What a batch came to, of which others may have a part."""
        mine = [transfer for transfer in rows.transfers if transfer.wallet_id == self.book.wallet_id]
        last = self.transfers[-1] if self.transfers else None
        for transfer in mine:
            assert transfer.wallet_seq == (last.wallet_seq if last else 0) + 1, "numbered without a gap"
            assert last is None or transfer.booked_at >= last.booked_at, "in order of time, even of a clock set back"
            self.moved[transfer.code] += transfer.amount
            last = transfer
        self.transfers += mine
        self.moved["used"] += sum(usage.cost for usage in rows.usages if usage.wallet_id == self.book.wallet_id)
        for rollup, sums in rows.rollups.items():
            self.moved["rolled up"] += sums[-1] if rollup.wallet_id == self.book.wallet_id else 0
        self.written.append(rows)

    def look_up(self, operation: Operation) -> None:
        """What the writer reads before the operation is decided."""
        if isinstance(operation, Refund):
            self.book.draws[operation.source_id] = self._draws(operation.source_id)
        elif isinstance(operation, TakeBack):
            self.book.draws[operation.grant_id] = self._draws(operation.grant_id)

    def _draws(self, source_id: UUID) -> list[Draw]:
        transfers = [t for t in self.transfers if t.hold_id == source_id]
        return [Draw(t.credit_account if t.code == "refund" else t.debit_account, t.amount, t.code) for t in transfers]

    def set_budget(self, subject: Subject, who: UUID, limits: dict[Period, int], now: datetime) -> None:
        """As somebody else does, which makes the writer load the book anew."""
        today = now.date()
        spending = Spending(limits, today)
        for rows in self.written:
            spent: list[tuple[Rollup | ChargeDay, int]] = [(key, sums[-1]) for key, sums in rows.rollups.items()]
            spent += rows.charges.items()
            for key, cost in spent:
                same_month = (key.day.year, key.day.month) == (today.year, today.month)
                if who in (key.key_id, key.user_id) and same_month and key.day <= today:
                    spending.month += cost
                    spending.day += cost if key.day == today else 0
        spending.held = sum(
            hold.amount
            for hold in self.book.holds.values()
            if hold.resolution is None and who in (hold.row.key_id, hold.row.user_id)
        )
        self.book.spending[subject, who] = spending

    @property
    def accounts(self) -> list[Account]:
        return [*self.book.accounts.values(), *(g.account for g in self.book.grants.values())]

    def fingerprint(self) -> tuple[object, ...]:
        """Everything that an operation may change."""
        holds = [
            (h.row.id, h.expires_at, h.usage, h.resolution, h.posted_cost, h.amount, h.slices)
            for h in self.book.holds.values()
        ]
        return self.book.seq, self.book.balance, [a.counters() for a in self.accounts], holds

    def check(self) -> None:
        """What must hold after every operation."""
        book, accounts = self.book, self.accounts
        assert sum(a.debits_posted for a in accounts) == sum(a.credits_posted for a in accounts)
        assert sum(a.debits_pending for a in accounts) == sum(a.credits_pending for a in accounts)
        assert all(a.free >= 0 for a in accounts if a.limited)
        assert all(min(a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending) >= 0 for a in accounts)
        held = sum(h.amount for h in book.holds.values() if h.resolution is None)
        assert sum(a.debits_pending for a in accounts) == held
        assert book.balance == sum(a.left for a in accounts if a.limited)
        moved, revenue = self.moved, book.accounts["revenue"]
        assert moved["used"] == moved["rolled up"]
        assert revenue.credits_posted == moved["used"] + moved["charge"]
        assert revenue.debits_posted == moved["refund"]
        assert book.owed >= 0
        assert len(self.transfers) == book.seq
