"""The kernel on a book in memory: what the writer does, without a database."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from services.billing.domain import DEFAULT_CLASS, Price, PriceTerms
from services.billing.errors import IdempotencyMismatch
from services.billing.ledger import kernel
from services.billing.ledger.batch import Ids
from services.billing.ledger.book import Account, Book, Journal
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from services.billing.ledger.rows import Rows
from shared.errors import TollgateError
from shared.ids import uuid7

MODEL = "chat-mini"


class MemoryLedger:
    """One wallet, one price; every row that was ever written."""

    def __init__(self, wallet_id: UUID, terms: PriceTerms, now: datetime) -> None:
        self.prices = {(MODEL, DEFAULT_CLASS): [Price(uuid7(), MODEL, DEFAULT_CLASS, terms, now)]}
        self.book = Book(wallet_id)
        self.book.open(self.journal(now))
        self.written: list[Rows] = []
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
        key = operation.keys[int(kernel.is_late(self.book, operation))]
        try:
            result = kernel.decide(batch, self.book, operation)
        except TollgateError:
            assert journal is not None or batch.rows == Rows(), "a refusal writes nothing"
            raise
        self.memory[key] = (operation.body_sha256(), result)
        if journal is None:
            self.written.append(batch.rows)
        return result

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
        charged = sum(usage.cost for rows in self.written for usage in rows.usages)
        charged += sum(t.amount for rows in self.written for t in rows.transfers if t.code == "charge")
        assert book.accounts["revenue"].credits_posted == charged
        assert charged == sum(sums[-1] for rows in self.written for sums in rows.rollups.values()) + sum(
            t.amount for rows in self.written for t in rows.transfers if t.code == "charge"
        )
        assert book.owed >= 0
