"""Applies operations to the ledger: one operation is one transaction.

    lock the wallet's row → was this done before? → load the book → kernel → write, and remember → COMMIT → answer

Failure modes:
- The connection breaks, or PostgreSQL restarts, or gives up the transaction: nothing was written, or all of it was
  and the acknowledgement was lost. Either way the same operation is sent again, a bounded number of times, and finds
  out by its key. After that the caller gets `billing_unavailable` and may come again with the same id.
- The caller goes away: the transaction goes on, in a task of its own, and `close` waits for it. A caller that comes
  again with the same operation meanwhile waits for that task: retries do not queue up.
- Too many wait: `billing_overloaded`, at once.
Operations on one wallet queue up in this process before they take a connection, so that one busy wallet does not
starve the others of the pool.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID
from weakref import WeakValueDictionary

from services.billing.domain import customer_classes
from services.billing.errors import REFUSALS, HoldNotFound, IdempotencyMismatch, LedgerUnavailable
from services.billing.ledger import kernel
from services.billing.ledger.book import SYSTEM_KINDS, Account, Book, Rows
from services.billing.ledger.operations import GrantCredits, OpenWallet, Operation, PlaceHold
from services.billing.ledger.results import Result, result_from_json, result_to_json
from services.billing.repository import ledger as repository
from services.billing.repository.database import Connection, Database
from services.billing.repository.ledger import Locked, Remembered
from shared.errors import TollgateError
from shared.ids import uuid7
from shared.money import NANO_PER_CREDIT
from shared.telemetry import BillingMetrics

SIGNUP_SOURCE = "signup"
GRANT_PRIORITY = 100


class Ledger(Protocol):
    """What the rest of billing knows of the ledger."""

    async def submit(self, operation: Operation) -> Result:
        """Apply an operation, or find out what became of it. The result is durable when this returns.

        Raises the refusal (services/billing/errors.py), or LedgerUnavailable.
        """


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """The writer's queue and its wait, all attempts of an operation together."""

    operation_timeout_s: float = 15.0
    operations_in_flight_max: int = 1_000


class Writer:
    """The ledger on PostgreSQL, one transaction an operation. `signup_credits` is in nano-credits."""

    def __init__(
        self, database: Database, *, signup_credits: int, metrics: BillingMetrics, limits: WriterLimits | None = None
    ) -> None:
        self._database = database
        self._signup_credits = signup_credits
        self._metrics = metrics
        self._limits = limits or WriterLimits()
        self._queues: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Result]] = set()
        self._under_way: dict[tuple[UUID, str], tuple[bytes, asyncio.Task[Result]]] = {}

    async def submit(self, operation: Operation) -> Result:
        """See `Ledger.submit`."""
        return await asyncio.shield(self._joined(operation) if operation.remembered else self._begun(operation))

    async def close(self) -> None:
        """Wait for what is under way; its callers may be gone."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _joined(self, operation: Operation) -> asyncio.Task[Result]:
        """The task of this operation, begun now unless it is under way. Raises IdempotencyMismatch."""
        key, digest = (operation.tenant, operation.key), operation.body_sha256()
        if key in self._under_way:
            first_digest, first = self._under_way[key]
            if first_digest != digest:
                self._count(operation, IdempotencyMismatch.default_code)
                raise IdempotencyMismatch()
            return first
        task = self._begun(operation)
        self._under_way[key] = digest, task
        task.add_done_callback(lambda _: self._under_way.pop(key))
        return task

    def _begun(self, operation: Operation) -> asyncio.Task[Result]:
        if len(self._tasks) >= self._limits.operations_in_flight_max:
            self._count(operation, "billing_overloaded")
            raise LedgerUnavailable(code="billing_overloaded", retry_after_s=1)
        task = asyncio.create_task(self._apply(operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _apply(self, operation: Operation) -> Result:
        try:
            async with asyncio.timeout(self._limits.operation_timeout_s):
                queue = self._queues.setdefault(operation.wallet_id, asyncio.Lock())
                async with queue:
                    return await self._durably(operation)
        except TimeoutError as e:
            self._count(operation, LedgerUnavailable.default_code)
            raise LedgerUnavailable(detail="operation_timeout_s is over", retry_after_s=1) from e
        except TollgateError as e:
            self._count(operation, e.code)
            raise

    async def _durably(self, operation: Operation) -> Result:
        async def attempt(connection: Connection) -> _Transaction:
            transaction = _Transaction(connection, operation, self._signup_credits)
            await transaction.run()
            return transaction

        committed = await self._database.transaction(attempt)
        if committed.book is not None:
            self._count_credits(committed.book.rows)
        if committed.refusal is not None:
            raise committed.refusal
        self._count(operation, "replayed" if committed.replayed else "applied")
        return committed.result

    def _count(self, operation: Operation, result: str) -> None:
        self._metrics.operations.labels(operation.kind, result).inc()

    def _count_credits(self, rows: Rows) -> None:
        for usage in rows.usages:
            self._metrics.credits_settled.labels(usage.hold.model, usage.build).inc(usage.cost / NANO_PER_CREDIT)


class _Transaction:
    """One attempt at one operation. After COMMIT it has a `result` or a `refusal`."""

    def __init__(self, connection: Connection, operation: Operation, signup_credits: int) -> None:
        self._connection = connection
        self._operation = operation
        self._signup_credits = signup_credits
        self.result: Result = None
        self.refusal: TollgateError | None = None
        self.replayed = False
        self.book: Book | None = None

    async def run(self) -> None:
        connection, operation = self._connection, self._operation
        locked = await repository.lock_wallet(connection, operation.wallet_id)
        is_new = False
        if locked is None:
            if not operation.opens_wallet:
                raise HoldNotFound()
            is_new = await repository.insert_wallet(connection, operation.wallet_id)
            locked = await repository.lock_wallet(connection, operation.wallet_id)
            assert locked is not None, "wallets are never removed"
        if operation.remembered:
            remembered = await repository.find_operation(connection, operation.tenant, operation.keys)
            if remembered is not None:
                self._recall(remembered)
                return
        book = await self._load(locked, is_new)
        if is_new or isinstance(operation, OpenWallet):
            await self._welcome(book)
        await self._decide(book)
        if book.touched or book.rows != Rows():
            await repository.write(connection, book)
        self.book = book

    def _recall(self, remembered: Remembered) -> None:
        """Raising ends the transaction: nothing has been written but, perhaps, the row of a wallet that stays away."""
        if remembered.body_sha256 != self._operation.body_sha256():
            raise IdempotencyMismatch()
        if remembered.refusal is not None:
            raise REFUSALS[remembered.refusal](**json.loads(remembered.result))
        self.result = result_from_json(remembered.kind, remembered.result)
        self.replayed = True

    async def _load(self, locked: Locked, is_new: bool) -> Book:
        operation = self._operation
        now = await repository.clock(self._connection)
        book = Book(
            wallet_id=operation.wallet_id,
            seq=locked.seq,
            is_frozen=locked.is_frozen,
            now=now,
            booked_at=max(now, locked.updated_at),
            op_id=uuid7(),
            accounts={},
        )
        if is_new:
            for kind in SYSTEM_KINDS:
                book.add_account(Account(uuid7(), kind))
        else:
            await repository.load_accounts(self._connection, book)
        hold_id = getattr(operation, "hold_id", None)
        if hold_id is not None:
            await repository.load_hold(self._connection, book, hold_id)
        if isinstance(operation, PlaceHold):
            classes = customer_classes(operation.wallet_id, operation.plan)
            await repository.load_prices(self._connection, book, operation.model, classes)
        return book

    async def _welcome(self, book: Book) -> None:
        """The sign-up grant, an operation of its own in this transaction: once a person, whatever wallets they open."""
        person = getattr(self._operation, "user_id", None)
        if person is None or self._signup_credits == 0:
            return
        signup = GrantCredits(
            wallet_id=book.wallet_id,
            account_id=uuid7(),
            amount=self._signup_credits,
            source=SIGNUP_SOURCE,
            reason="Credits for a new account",
            priority=GRANT_PRIORITY,
            expires_at=None,
            idempotency_tenant=person,
            idempotency_key=f"signup:{person}",
            author="service",
        )
        if await repository.find_operation(self._connection, signup.tenant, signup.keys) is not None:
            return
        await self._remember(book, signup, signup.key, kernel.decide(book, signup), None)
        book.op_id = uuid7()

    async def _decide(self, book: Book) -> None:
        operation = self._operation
        key = kernel.memory_key(book, operation)
        try:
            self.result = kernel.decide(book, operation)
        except TollgateError as e:
            self.refusal = e
            if e.code not in REFUSALS:
                return
        if operation.remembered:
            await self._remember(book, operation, key, self.result, self.refusal)

    async def _remember(
        self, book: Book, operation: Operation, key: str, result: Result, refusal: TollgateError | None
    ) -> None:
        details = {} if refusal is None else {"param": refusal.param, "retry_after_s": refusal.retry_after_s}
        await repository.insert_operation(
            self._connection,
            tenant=operation.tenant,
            key=key,
            op_id=book.op_id,
            kind=operation.kind,
            body_sha256=operation.body_sha256(),
            refusal=None if refusal is None else refusal.code,
            result=json.dumps(details) if refusal is not None else result_to_json(result),
            actor=operation.actor,
            at=book.now,
        )
