"""One batch is one transaction: read, load what is not in memory, let the kernel decide, write, COMMIT.

What was decided is in the books at once, and in the database after COMMIT. When anything fails in between, the books
of the batch's wallets are forgotten: the next batch loads them anew.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from uuid import UUID

from services.billing.domain import Price, customer_classes
from services.billing.errors import REFUSALS, HoldNotFound, IdempotencyMismatch
from services.billing.ledger import failpoints, kernel
from services.billing.ledger.book import Book, Journal
from services.billing.ledger.operations import (
    GRANT_PRIORITY,
    ExpireHold,
    ExtendHold,
    GrantCredits,
    Heartbeat,
    OpenWallet,
    Operation,
    PlaceHold,
    Refund,
    Settle,
    TakeBack,
    Void,
)
from services.billing.ledger.results import Result, result_from_json, result_to_json
from services.billing.ledger.rows import OperationRow
from services.billing.repository import ledger as repository
from services.billing.repository.database import Connection
from services.billing.repository.ledger import FirstLook, Remembered
from services.billing.repository.ledger_write import write
from shared.errors import TollgateError
from shared.ids import is_service_account

SIGNUP_SOURCE = "signup"
PRICES_MAX = 100_000  # pairs of a model and a customer class that a writer remembers, those without a price too
_RESOLVING = (Settle, Void, Heartbeat, ExtendHold, ExpireHold)


class Fenced(Exception):
    """Another writer leads this shard now. Nothing of the batch was written."""


@dataclass(slots=True)
class Pending:
    """An operation that waits for its transaction, and who waits for it."""

    operation: Operation
    keys: tuple[str, ...]  # none for what is not remembered
    digest: bytes
    deadline_s: float
    waiters: list[asyncio.Future[Result]] = field(default_factory=list)
    result: Result = None
    error: TollgateError | None = None
    outcome: str = ""


@dataclass(slots=True)
class Memory:
    """What a writer knows between its transactions: the books of wallets used last, and prices."""

    wallets_max: int
    books: OrderedDict[UUID, Book] = field(default_factory=OrderedDict)
    prices: dict[tuple[str, str], list[Price]] = field(default_factory=dict)
    price_generation: int = 0

    def forget(self, wallets: Iterable[UUID]) -> None:
        for wallet_id in wallets:
            self.books.pop(wallet_id, None)

    def keep(self, books: Iterable[Book]) -> None:
        for book in books:
            self.books[book.wallet_id] = book
            self.books.move_to_end(book.wallet_id)
        while len(self.books) > self.wallets_max:
            self.books.popitem(last=False)


class Batch:
    """One attempt at some operations. After `run` each of them has a result or an error, durably."""

    def __init__(
        self, connection: Connection, memory: Memory, pendings: Sequence[Pending], *, signup_credits: int, careful: bool
    ) -> None:
        """`careful` looks for holds of the same id in other wallets too; else their primary key ends the attempt."""
        self._connection = connection
        self._memory = memory
        self._pendings = pendings
        self._signup_credits = signup_credits
        self._careful = careful
        self._wallets = list(dict.fromkeys(p.operation.wallet_id for p in pendings))
        self._had_signup: set[UUID] = set()
        self._books: dict[UUID, Book] = {}

    async def run(self, shard: int, epoch: int) -> Journal:
        """Raises Fenced, BookOutdated and whatever asyncpg does: nothing is written, or the COMMIT's answer is lost."""
        try:
            await self._connection.execute(repository.BEGIN)
            journal = await self._decided(shard, epoch)
            failpoints.reached("batch_decided")
            if journal.books or journal.touched or journal.rows.operations or journal.rows.opened:
                await write(self._connection, journal)
            failpoints.reached("batch_written")
            await self._connection.execute("COMMIT;")
        except BaseException:
            self._memory.forget(self._wallets)
            raise
        failpoints.reached("batch_committed")
        for book in self._books.values():
            book.written()
        self._memory.keep(self._books.values())
        return journal

    async def _decided(self, shard: int, epoch: int) -> Journal:
        look, remembered = await self._look(shard)
        if look.epoch != epoch:
            raise Fenced()
        failpoints.reached("batch_read")
        left = [p for p in self._pendings if not self._recall(p, remembered.get(id(p)))]
        await self._load_books(look)
        await self._load_details(left)
        journal = Journal(look.now, Ids(), self._memory.prices, UUID(int=0))
        for pending in left:
            self._apply(journal, pending)
        return journal

    async def _look(self, shard: int) -> tuple[FirstLook, dict[int, Remembered]]:
        """What is remembered of the operations is by their `id()`."""
        keys, owners = [], []
        for pending in self._pendings:
            operation = pending.operation
            for key in pending.keys:
                keys.append((operation.tenant, key))
                owners.append(id(pending))
        people = list({person for p in self._pendings if (person := self._newcomer(p.operation)) is not None})
        signups = [(person, f"signup:{person}") for person in people]
        look = await repository.first_look(self._connection, shard, self._wallets, [*keys, *signups])
        self._had_signup = {people[n - len(keys)] for n in look.remembered if n >= len(keys)}
        return look, {owners[n]: found for n, found in look.remembered.items() if n < len(keys)}

    def _newcomer(self, operation: Operation) -> UUID | None:
        """The person who may get sign-up credits by this operation."""
        if self._signup_credits == 0:
            return None
        if isinstance(operation, OpenWallet):
            return operation.user_id
        if isinstance(operation, PlaceHold) and operation.wallet_id not in self._memory.books:
            return operation.user_id
        return None

    def _recall(self, pending: Pending, found: Remembered | None) -> bool:
        """Whether the operation was done before; then this is its result."""
        pending.result, pending.error, pending.outcome = None, None, ""
        if found is None:
            return False
        pending.outcome = "replayed"
        if found.body_sha256 != pending.digest:
            pending.error = IdempotencyMismatch()
        elif found.refusal is not None:
            pending.error = REFUSALS[found.refusal](**json.loads(found.result))
        else:
            pending.result = result_from_json(found.kind, found.result)
        return True

    async def _load_books(self, look: FirstLook) -> None:
        memory, missing = self._memory, []
        if look.price_generation != memory.price_generation or len(memory.prices) > PRICES_MAX:
            memory.prices.clear()
            memory.price_generation = look.price_generation
        for wallet_id, version in zip(self._wallets, look.versions, strict=True):
            book = memory.books.get(wallet_id)
            if book is not None and version == (book.version, book.seq_written):
                self._books[wallet_id] = book
            elif version is not None:
                missing.append(wallet_id)
        if missing:
            self._books.update(await repository.load_books(self._connection, missing, look.now))

    async def _load_details(self, pendings: Sequence[Pending]) -> None:
        """Holds and refunded draws that are not in memory, and prices."""
        hold_ids, prices, placed = set(), set(), set()
        for pending in pendings:
            operation = pending.operation
            book = self._books.get(operation.wallet_id)
            if isinstance(operation, PlaceHold):
                placed.add(operation.hold_id)
                if self._careful:
                    hold_ids.add(operation.hold_id)
                for customer_class in customer_classes(operation.wallet_id, operation.plan):
                    if (operation.model, customer_class) not in self._memory.prices:
                        prices.add((operation.model, customer_class))
            elif isinstance(operation, _RESOLVING) and (book is None or operation.hold_id not in book.holds):
                if operation.hold_id not in placed:
                    hold_ids.add(operation.hold_id)
            elif isinstance(operation, Refund | TakeBack) and book is not None:
                source_id = operation.source_id if isinstance(operation, Refund) else operation.grant_id
                if source_id not in book.draws:
                    await repository.load_draws(self._connection, book, source_id)
        if prices:
            self._memory.prices.update(await repository.load_prices(self._connection, prices))
        if hold_ids:
            await self._load_holds(hold_ids)

    async def _load_holds(self, hold_ids: set[UUID]) -> None:
        for hold in await repository.load_holds(self._connection, list(hold_ids)):
            for book in self._books.values():
                if book.wallet_id == hold.row.wallet_id:
                    book.holds[hold.row.id] = hold
                    if hold.resolution is not None:
                        book.resolved.append(hold.row.id)
                else:
                    book.foreign.add(hold.row.id)

    def _apply(self, journal: Journal, pending: Pending) -> None:
        operation = pending.operation
        book = self._books.get(operation.wallet_id)
        if book is None:
            if not operation.opens_wallet:
                pending.error, pending.outcome = HoldNotFound(), HoldNotFound.default_code
                return
            book = self._books[operation.wallet_id] = Book(operation.wallet_id)
            book.open(journal)
            self._welcome(journal, book, getattr(operation, "user_id", None))
        elif isinstance(operation, OpenWallet):
            self._welcome(journal, book, operation.user_id)
        late = kernel.is_late(book, operation)
        journal.op_id = journal.next_id()
        try:
            pending.result, pending.outcome = kernel.decide(journal, book, operation), "applied"
        except TollgateError as e:
            pending.error, pending.outcome = e, e.code
            if e.code not in REFUSALS:
                return
        if pending.keys:
            _remember(journal, operation, pending.keys[int(late)], pending.digest, pending.result, pending.error)

    def _welcome(self, journal: Journal, book: Book, person: UUID | None) -> None:
        """The sign-up grant, an operation of its own: once a person and once a wallet."""
        if person is None or is_service_account(person):  # of those anybody makes as many as they like
            return
        if self._signup_credits == 0 or book.has_signup or person in self._had_signup:
            return
        signup = GrantCredits(
            wallet_id=book.wallet_id,
            account_id=journal.next_id(),
            amount=self._signup_credits,
            source=SIGNUP_SOURCE,
            reason="Credits for a new account",
            priority=GRANT_PRIORITY,
            expires_at=None,
            idempotency_tenant=person,
            idempotency_key=f"signup:{person}",
            author="service",
        )
        self._had_signup.add(person)
        journal.op_id = journal.next_id()
        result = kernel.decide(journal, book, signup)
        _remember(journal, signup, signup.key, signup.body_sha256(), result, None)


def _remember(
    journal: Journal, operation: Operation, key: str, digest: bytes, result: Result, refusal: TollgateError | None
) -> None:
    if refusal is None:
        code, text = None, result_to_json(result)
    else:
        code, text = refusal.code, json.dumps({"param": refusal.param, "retry_after_s": refusal.retry_after_s})
    journal.rows.operations.append(
        OperationRow(operation.tenant, key, journal.op_id, operation.kind, digest, code, text, operation.actor)
    )


class Ids:
    """UUIDv7s of one millisecond that follow each other (RFC 9562 §6.2, method 2): one draw of randomness a batch."""

    def __init__(self) -> None:
        random = int.from_bytes(os.urandom(9), "big")
        rand_a, rand_b = random & 0xFFF, random >> 12 & ((1 << 60) - 1)
        first = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | rand_a << 64 | 0b10 << 62 | rand_b
        self._next = count(first).__next__

    def __call__(self) -> UUID:
        return UUID(int=self._next())
