"""One batch is one transaction: read, load what is not in memory, let the kernel decide, write, COMMIT.

What was decided is in the books at once, and in the database after COMMIT. When anything fails in between, the books
of the batch's wallets are forgotten: the next batch loads them anew.

While PostgreSQL writes one batch, the next is decided ahead, on the books as the first one leaves them. Its own
transaction begins after the first one's COMMIT and looks first, as ever: at the epoch, at every key, at what version
its wallets are, at the prices. Only if all that is as the decision took it to be is it written; else it is taken back,
and the batch is decided as if nothing had been.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from uuid import UUID

from services.billing.domain import customer_classes
from services.billing.errors import REFUSALS, HoldNotFound, IdempotencyMismatch
from services.billing.ledger import failpoints, kernel
from services.billing.ledger.book import Book, Journal
from services.billing.ledger.memory import Memory
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
from shared.ids import as_uuid, is_service_account

SIGNUP_SOURCE = "signup"
PRICES_AT_ONCE_MAX = 2_000  # if there are no more, all of them are in memory
PRICES_MAX = 100_000  # else: pairs of a model and a customer class that a writer remembers, those without a price too
_RESOLVING = (Settle, Void, Heartbeat, ExtendHold, ExpireHold)
_FORESEEABLE = frozenset({PlaceHold, Settle, Void, Heartbeat, ExtendHold})


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

    def decided(self, outcome: str, *, result: Result = None, error: TollgateError | None = None) -> None:
        """What is answered once that is committed. An earlier decision is forgotten."""
        self.outcome, self.result, self.error = outcome, result, error


class Batch:
    """One attempt at some operations. After `run` each of them has a result or an error, durably."""

    def __init__(
        self, connection: Connection, memory: Memory, pendings: Sequence[Pending], *, signup_credits: int, careful: bool
    ) -> None:
        """`careful` looks for holds of the same id in other wallets too; else their primary key ends the attempt."""
        self._connection = connection
        self._memory = memory
        self.pendings = list(pendings)
        self._signup_credits = signup_credits
        self._careful = careful
        self._wallets: list[UUID] = []
        self._had_signup: set[UUID] = set()
        self._books: dict[UUID, Book] = {}
        self._journal: Journal | None = None  # of what was decided ahead
        self._ahead: dict[int, Pending] = {}  # those operations, by their `id()`
        self._unknown: set[UUID] = set()  # the wallets of which something has to wait for the transaction
        self._price_generation = memory.price_generation

    def takes(self, pending: Pending) -> bool:
        """Whether it may come in addition. With those decided ahead goes nothing for which their time is too early."""
        return self._journal is None or type(pending.operation) in _FORESEEABLE

    @property
    def is_ahead(self) -> bool:
        """Whether it is decided ahead, as far as it is."""
        return self._journal is not None

    def decide_ahead(self, pendings: Sequence[Pending]) -> None:
        """Take these in addition, and decide what needs nothing from the database, before the transaction: `run` finds
        out whether it stands."""
        self.pendings += pendings
        now = self._memory.now()
        if now is None or any(type(pending.operation) not in _FORESEEABLE for pending in pendings):
            return
        if self._journal is None:
            self._price_generation = self._memory.price_generation
            self._journal = Journal(now, Ids(), self._memory.prices, UUID(int=0))
        self._note_unknown(pendings)
        for pending in pendings:
            wallet_id = pending.operation.wallet_id
            if wallet_id not in self._unknown:
                self._books[wallet_id] = self._memory.books[wallet_id]
                self._ahead[id(pending)] = pending
                self._apply(self._journal, pending)

    def take_back(self) -> None:
        """Forget what was decided ahead, with the books that it was decided on."""
        for wallet_id, book in self._books.items():
            book.is_spoilt = True
            self._memory.books.pop(wallet_id, None)
        for pending in self._ahead.values():
            pending.decided("")
        self._books, self._journal, self._ahead, self._unknown = {}, None, {}, set()

    async def run(self, shard: int, epoch: int, meanwhile: Callable[[], None] | None = None) -> Journal:
        """`meanwhile` is called, at most once, while PostgreSQL writes: it may decide on these books ahead.

        Raises Fenced, BookOutdated and whatever asyncpg does: nothing is written, or the COMMIT's answer is lost.
        """
        self._wallets = list(dict.fromkeys(p.operation.wallet_id for p in self.pendings))
        try:
            await self._connection.execute(repository.BEGIN)
            journal = await self._decided(shard, epoch)
            failpoints.reached("batch_decided")
            # From here on the books may be further than this batch.
            endings = [(book, book.ending()) for book in self._books.values()]
            if journal.books or journal.touched or journal.rows.operations or journal.rows.opened:
                await self._write(journal, meanwhile)
            failpoints.reached("batch_written")
            await self._connection.execute("COMMIT;")
        except BaseException:
            self._memory.forget(self._wallets)
            raise
        failpoints.reached("batch_committed")
        for book, ending in endings:
            book.written(ending)
        self._memory.keep(self._books.values())
        return journal

    async def _write(self, journal: Journal, meanwhile: Callable[[], None] | None) -> None:
        """`write` makes its rows before it waits for the first time, and only then is `meanwhile` called."""
        called = asyncio.get_running_loop().call_soon(meanwhile) if meanwhile is not None else None
        try:
            await write(self._connection, journal)
        finally:
            if called is not None:
                called.cancel()

    async def _decided(self, shard: int, epoch: int) -> Journal:
        look, remembered = await self._look(shard)
        if look.epoch != epoch:
            raise Fenced()
        failpoints.reached("batch_read")
        self._memory.looked_at, self._memory.looked_s = look.now, time.monotonic()
        if self._ahead and not self._stands(look, remembered):
            self.take_back()
        # One batch has one time: days' sums and usage, for one, must fall on the same side of midnight.
        journal = self._journal or Journal(look.now, Ids(), self._memory.prices, UUID(int=0))
        left = [p for p in self.pendings if id(p) not in self._ahead and not self._recall(p, remembered.get(id(p)))]
        await self._load_books(look, journal.now)
        await self._load_details(left)
        for pending in left:
            self._apply(journal, pending)
        return journal

    def _note_unknown(self, pendings: Sequence[Pending]) -> None:
        """The wallets of which some operation needs what is not in memory, or was perhaps done before."""
        memory, unknown, placed = self._memory, self._unknown, set[tuple[UUID, UUID]]()
        for operation in (pending.operation for pending in pendings):
            book = memory.books.get(operation.wallet_id)
            if book is None:
                unknown.add(operation.wallet_id)
            elif isinstance(operation, PlaceHold):
                placed.add((operation.wallet_id, operation.hold_id))
                pairs = ((operation.model, c) for c in customer_classes(operation.wallet_id, operation.plan))
                if operation.hold_id in book.holds or not all(memory.has_prices(*pair) for pair in pairs):
                    unknown.add(operation.wallet_id)
            elif isinstance(operation, _RESOLVING) and (operation.wallet_id, operation.hold_id) not in placed:
                hold = book.holds.get(operation.hold_id)
                if hold is None or hold.resolution is not None:
                    unknown.add(operation.wallet_id)

    def _stands(self, look: FirstLook, remembered: dict[int, Remembered]) -> bool:
        """Whether the database is as what was decided ahead took it to be."""
        if look.price_generation != self._price_generation or not remembered.keys().isdisjoint(self._ahead):
            return False
        return all(
            book is None or version == (book.version, book.seq_written)
            for book, version in zip(map(self._books.get, self._wallets), look.versions, strict=True)
        )

    async def _look(self, shard: int) -> tuple[FirstLook, dict[int, Remembered]]:
        """What is remembered of the operations is by their `id()`."""
        keys, owners = [], []
        for pending in self.pendings:
            operation = pending.operation
            for key in pending.keys:
                keys.append((operation.tenant, key))
                owners.append(id(pending))
        people = list({person for p in self.pendings if (person := self._newcomer(p.operation)) is not None})
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
        if found is None:
            return False
        if found.body_sha256 != pending.digest:
            pending.decided("replayed", error=IdempotencyMismatch())
        elif found.refusal is not None:
            pending.decided("replayed", error=REFUSALS[found.refusal](**json.loads(found.result)))
        else:
            pending.decided("replayed", result=result_from_json(found.kind, found.result))
        return True

    async def _load_books(self, look: FirstLook, now: datetime) -> None:
        memory, missing = self._memory, []
        if look.price_generation != memory.price_generation or len(memory.prices) > PRICES_MAX:
            memory.forget_prices(look.price_generation)
        for wallet_id, version in zip(self._wallets, look.versions, strict=True):
            book = self._books.get(wallet_id) or memory.books.get(wallet_id)
            if book is not None and version == (book.version, book.seq_written):
                self._books[wallet_id] = book
            elif version is not None:
                memory.books.pop(wallet_id, None)  # nobody decides ahead on it
                missing.append(wallet_id)
        if missing:
            self._books.update(await repository.load_books(self._connection, missing, now))

    async def _load_details(self, pendings: Sequence[Pending]) -> None:
        """Holds and refunded draws that are not in memory, and prices."""
        hold_ids, prices, placed = set(), set(), set[tuple[UUID, UUID]]()
        for pending in pendings:
            operation = pending.operation
            book = self._books.get(operation.wallet_id)
            if isinstance(operation, PlaceHold):
                placed.add((operation.wallet_id, operation.hold_id))
                if self._careful:
                    hold_ids.add(operation.hold_id)
                for customer_class in customer_classes(operation.wallet_id, operation.plan):
                    if not self._memory.has_prices(operation.model, customer_class):
                        prices.add((operation.model, customer_class))
            elif isinstance(operation, _RESOLVING) and (book is None or operation.hold_id not in book.holds):
                if (operation.wallet_id, operation.hold_id) not in placed:
                    hold_ids.add(operation.hold_id)
            elif isinstance(operation, Refund | TakeBack) and book is not None:
                source_id = operation.source_id if isinstance(operation, Refund) else operation.grant_id
                if source_id not in book.draws:
                    await repository.load_draws(self._connection, book, source_id)
        if prices:
            await self._load_prices(prices)
        if hold_ids:
            await self._load_holds(hold_ids)

    async def _load_prices(self, wanted: set[tuple[str, str]]) -> None:
        memory = self._memory
        if memory.has_every_price is None:
            every = await repository.load_every_price(self._connection, PRICES_AT_ONCE_MAX)
            memory.has_every_price = every is not None
            memory.prices.update(every or {})
        if not memory.has_every_price:
            memory.prices.update(await repository.load_prices(self._connection, wanted))

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
                pending.decided(HoldNotFound.default_code, error=HoldNotFound())
                return
            book = self._books[operation.wallet_id] = Book(operation.wallet_id)
            book.open(journal)
            self._welcome(journal, book, getattr(operation, "user_id", None))
        elif isinstance(operation, OpenWallet):
            self._welcome(journal, book, operation.user_id)
        late = kernel.is_late(book, operation)
        journal.op_id = journal.next_id()
        try:
            pending.decided("applied", result=kernel.decide(journal, book, operation))
        except TollgateError as e:
            pending.decided(e.code, error=e)
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
        return as_uuid(self._next().to_bytes(16, "big"))
