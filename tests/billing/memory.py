"""The kernel on a book in memory: what the writer does, without a database."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from services.billing.domain import DEFAULT_CLASS, Price, PriceTerms
from services.billing.errors import IdempotencyMismatch
from services.billing.ledger import kernel
from services.billing.ledger.book import SYSTEM_KINDS, Account, Book, Rows
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from shared.errors import TollgateError
from shared.ids import uuid7

MODEL = "chat-mini"


class MemoryLedger:
    """One wallet, one price; every transfer that was ever written."""

    def __init__(self, wallet_id: UUID, terms: PriceTerms, now: datetime) -> None:
        accounts = {kind: Account(uuid7(), kind) for kind in SYSTEM_KINDS}
        self.book = Book(wallet_id, 0, False, now, now, uuid7(), accounts)
        self.book.prices[MODEL, DEFAULT_CLASS] = Price(uuid7(), MODEL, DEFAULT_CLASS, terms, now)
        self.written: list[Rows] = []
        self.memory: dict[str, tuple[bytes, Result | TollgateError]] = {}

    def apply(self, operation: Operation, now: datetime) -> Result:
        for key in operation.keys if operation.remembered else ():
            if key in self.memory:
                digest, outcome = self.memory[key]
                if digest != operation.body_sha256():
                    raise IdempotencyMismatch()
                if isinstance(outcome, TollgateError):
                    raise outcome
                return outcome
        book = self.book
        book.now, book.booked_at, book.op_id, book.rows, book.touched = now, now, uuid7(), Rows(), {}
        key = kernel.memory_key(book, operation)
        result = kernel.decide(book, operation)
        self.memory[key] = (operation.body_sha256(), result)
        self.written.append(book.rows)
        return result

    def fingerprint(self) -> tuple[object, ...]:
        """Everything that an operation may change."""
        book = self.book
        accounts = [*book.accounts.values(), *(g.account for g in book.grants.values())]
        counters = [(a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending) for a in accounts]
        holds = [(h.row.id, h.open, h.resolution, h.posted_cost) for h in book.holds.values()]
        return book.seq, counters, holds

    def check(self) -> None:
        """What must hold after every operation."""
        book = self.book
        accounts = [*book.accounts.values(), *(g.account for g in book.grants.values())]
        assert sum(a.debits_posted for a in accounts) == sum(a.credits_posted for a in accounts)
        assert sum(a.debits_pending for a in accounts) == sum(a.credits_pending for a in accounts)
        assert all(a.free >= 0 for a in accounts if a.limited)
        assert all(min(a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending) >= 0 for a in accounts)
        held = sum(h.row.amount for h in book.holds.values() if h.open is not None)
        assert sum(a.debits_pending for a in accounts) == held
        charged = sum(usage.cost for rows in self.written for usage in rows.usages)
        assert book.accounts["revenue"].credits_posted == charged
        assert book.owed >= 0
        assert book.owed == 0 or book.available == 0
        assert all((h.open is None) != (h.resolution is None) for h in book.holds.values())
