"""The writer of one shard: operations queue up while a transaction is under way, and go together in the next one.

    queue → batch (as many as are there, at once) → transaction → answers

One transaction is under way at a time. While PostgreSQL writes it, the next batch is decided ahead (batch.py), as its
operations come. A batch that is committed while there is a next one is answered when PostgreSQL has that, so that it
has something to do meanwhile: `ANSWERED_WITHIN_S` after the COMMIT at the latest.

Failure modes:
- The connection breaks, or PostgreSQL restarts, or gives the transaction up: nothing was written, or all of it was and
  the acknowledgement was lost. The batch goes back to the head of the queue; the next leader of the shard, mostly this
  process on a new connection, sends it again, and finds by its keys what was done. What was decided ahead behind it is
  taken back, and its operations follow.
- Another process leads the shard: whoever waits here is told so (`NotLeading`) and goes there (shards.py).
- One operation cannot be written: the batch's operations are tried one by one, and only that one fails.
- The caller goes away: the operation is done all the same. A caller that comes again with the same operation
  meanwhile gets the answer of the first.
- Too many wait: `billing_overloaded`, at once. One has waited for `operation_timeout_s`: `billing_unavailable`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Protocol

import asyncpg

from services.billing.errors import IdempotencyMismatch, LedgerUnavailable
from services.billing.ledger import failpoints
from services.billing.ledger.batch import Batch, Fenced, Pending
from services.billing.ledger.book import Journal
from services.billing.ledger.memory import Memory
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from services.billing.repository.database import TRANSIENT, Connection
from services.billing.repository.ledger_write import BookOutdated
from shared.errors import Internal, TollgateError
from shared.money import NANO_PER_CREDIT
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)

ANSWERED_WITHIN_S = 0.01

# Not worth trying on this connection again; the next one finds out what was done.
_LOST: tuple[type[BaseException], ...] = (
    Fenced,
    *(cause for cause in TRANSIENT if cause is not asyncpg.UniqueViolationError),
)


class Ledger(Protocol):
    """What the rest of billing knows of the ledger."""

    async def submit(self, operation: Operation) -> Result:
        """Apply an operation, or find out what became of it. The result is durable when this returns.

        Raises the refusal (services/billing/errors.py), or LedgerUnavailable.
        """


class NotLeading(LedgerUnavailable):
    """This process does not write this shard now. Nothing was done here."""

    default_code = "billing_not_leading"


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """A writer's queue, batches, waits and memory."""

    operation_timeout_s: float = 15.0
    operations_in_flight_max: int = 10_000
    batch_operations_max: int = 256
    attempts_max: int = 5
    expiry_interval_s: float = 0.25
    wallets_in_memory_max: int = 20_000


class ShardWriter:
    """Applies the operations of one shard, in order. `signup_credits` is in nano-credits.

    `serve` does it as long as this process leads the shard; between two times of that, `accepts` says whether
    operations may wait here.
    """

    def __init__(self, shard: int, *, signup_credits: int, metrics: BillingMetrics, limits: WriterLimits) -> None:
        self.shard = shard
        self.accepts = False
        self._signup_credits = signup_credits
        self._metrics = metrics
        self._limits = limits
        self._memory = Memory(limits.wallets_in_memory_max)
        self._queue: list[Pending] = []
        self._in_flight: Sequence[Pending] = ()
        self._ahead: Batch | None = None
        self._durable: tuple[Sequence[Pending], Journal] | None = None  # committed, not answered
        self._looks: Callable[[], None] | None = None  # ahead, while PostgreSQL writes
        self._next_look: asyncio.Handle | None = None
        self._under_way: dict[tuple[int, str], Pending] = {}
        self._wake = asyncio.Event()

    def enqueue(self, operation: Operation) -> asyncio.Future[Result]:
        """The operation's answer, to come. Raises NotLeading, LedgerUnavailable, IdempotencyMismatch at once.

        Whoever waits may be cancelled: the operation is not.
        """
        if not self.accepts:
            raise NotLeading()
        answer: asyncio.Future[Result] = self._loop.create_future()
        if not operation.remembered:
            self._add(Pending(operation, (), b"", 0), answer)
            return answer
        keys, digest = operation.keys, operation.body_sha256()
        key = (operation.tenant.int, keys[0])  # an int: a UUID's hash is computed in Python
        first = self._under_way.get(key)
        if first is None:
            self._add(Pending(operation, keys, digest, 0), answer)
            self._under_way[key] = self._queue[-1]
        elif first.digest == digest:
            if not first.waiters:  # told that it takes too long, they come again
                first.deadline_s = time.monotonic() + self._limits.operation_timeout_s
            first.waiters.append(answer)
        else:
            self._count(operation.kind, IdempotencyMismatch.default_code)
            raise IdempotencyMismatch()
        return answer

    def _add(self, pending: Pending, answer: asyncio.Future[Result]) -> None:
        if len(self._queue) >= self._limits.operations_in_flight_max:
            self._count(pending.operation.kind, "billing_overloaded")
            raise LedgerUnavailable(code="billing_overloaded", retry_after_s=1)
        pending.deadline_s = time.monotonic() + self._limits.operation_timeout_s
        pending.waiters.append(answer)
        self._queue.append(pending)
        self._wake.set()
        self._look_soon()

    @property
    def waiting(self) -> int:
        """Operations that have no answer yet."""
        return len(self._queue) + len(self._in_flight) + (len(self._ahead.pendings) if self._ahead else 0)

    async def serve(self, connection: Connection, epoch: int, until: asyncio.Event) -> None:
        """Apply what comes, until the event. Raises Fenced, or what broke the connection; nothing is lost then."""
        self._memory = Memory(self._limits.wallets_in_memory_max)
        self._loop = asyncio.get_running_loop()  # CPython 3.11 asks the kernel for its process at each call
        self.accepts = True
        stopping = asyncio.create_task(until.wait())
        stopping.add_done_callback(lambda _: self._wake.set())
        # With the session its lock is gone: one who noticed only at the next operation would keep others from leading.
        connection.add_termination_listener(lambda _: self._wake.set())
        try:
            while not until.is_set():
                if connection.is_closed():
                    raise asyncpg.ConnectionDoesNotExistError("the writer's session has ended")
                await self._wake.wait()
                self._wake.clear()
                while (self._queue or self._ahead) and not until.is_set():
                    await self._take(connection, epoch)
        finally:
            stopping.cancel()
            self._answer_durable()
            self._take_back()

    def release(self) -> None:
        """Somebody else leads: whoever waits here has to go there."""
        self.accepts = False
        abandoned, self._queue = self._queue, []
        for pending in abandoned:
            self._fail(pending, NotLeading())

    async def watch(self) -> None:
        """Tell those who have waited too long, for ever. What is in flight may still be applied."""
        while True:
            await asyncio.sleep(self._limits.expiry_interval_s)
            self.tell_late()

    def tell_late(self) -> None:
        """Once. Whoever comes again for what is in flight waits for that: it is never there twice."""
        now = time.monotonic()
        ahead = self._ahead.pendings if self._ahead else ()
        for pending in (*self._in_flight, *ahead, *self._queue):
            if pending.deadline_s <= now and pending.waiters:
                self._count(pending.operation.kind, LedgerUnavailable.default_code)
                self._refuse(pending, LedgerUnavailable(detail="operation_timeout_s is over", retry_after_s=1))
        self._queue = self._wanted(self._queue)

    def _wanted(self, pendings: Iterable[Pending]) -> list[Pending]:
        """Those that somebody waits for still; the others are not in flight any more, and never will be."""
        wanted = []
        for pending in pendings:
            if pending.waiters:
                wanted.append(pending)
            else:
                self._done(pending)
        return wanted

    async def _take(self, connection: Connection, epoch: int) -> None:
        attempt, self._ahead = self._ahead or self._batch(connection, ()), None
        attempt.pendings += self._next(self._limits.batch_operations_max - len(attempt.pendings), attempt.takes)
        batch = self._in_flight = attempt.pendings
        failpoints.reached("batch_taken")
        try:
            await self._durably(connection, epoch, attempt)
        except BaseException:
            self._take_back()
            self._queue = self._wanted(batch) + self._queue
            raise
        finally:
            self._in_flight = ()

    def _next(self, size: int, fits: Callable[[Pending], bool]) -> list[Pending]:
        """As many as that from the head of the queue, up to the first that does not fit."""
        found = list(takewhile(fits, self._queue[:size]))
        self._queue = self._queue[len(found) :]
        return found

    def _batch(self, connection: Connection, pendings: Sequence[Pending], *, careful: bool = False) -> Batch:
        return Batch(connection, self._memory, pendings, signup_credits=self._signup_credits, careful=careful)

    def _while_written(self, connection: Connection) -> None:
        """PostgreSQL has a batch: time to answer the one before, and to decide what comes."""
        self._answer_durable()
        self._looks = partial(self._look_ahead, connection)
        self._look_soon()

    def _look_soon(self) -> None:
        """When everything that is about to come has come."""
        if self._looks is not None and self._next_look is None:
            self._next_look = self._loop.call_soon(self._looks)

    def _look_ahead(self, connection: Connection) -> None:
        """Decide what is in the queue now, on the assumption that the batch which is being written will be."""
        self._next_look = None
        ahead = self._ahead or self._batch(connection, ())
        room = self._limits.batch_operations_max - len(ahead.pendings)
        if not room or (self._ahead is not None and not ahead.is_ahead):
            return
        found = self._next(room, ahead.takes)
        if not found:
            return
        self._ahead = ahead
        try:
            ahead.decide_ahead(found)
        except Exception:
            log.exception("ahead_failed", shard=self.shard)  # its own transaction will tell whose fault it is
            ahead.take_back()
        failpoints.reached("batch_ahead")

    def _look_no_more(self) -> None:
        self._looks = None
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def _take_back(self) -> None:
        """What was decided ahead is not to be: its operations are the next of the queue."""
        if self._ahead is not None:
            self._ahead.take_back()
            self._queue = self._wanted(self._ahead.pendings) + self._queue
            self._ahead = None

    async def _durably(self, connection: Connection, epoch: int, attempt: Batch) -> None:
        """All at once; if that cannot be written, each on its own."""
        batch = attempt.pendings
        try:
            await self._attempt(epoch, attempt, partial(self._while_written, connection))
            return
        except _LOST:
            raise
        except Exception as e:  # noqa: BLE001 - whatever it is, it is one operation's, and its own attempt will tell
            self._take_back()
            log.warning("batch_divided", shard=self.shard, operations=len(batch), cause=type(e).__name__)
            await connection.execute("ROLLBACK")
        for pending in batch:
            await self._alone(connection, epoch, pending)

    async def _alone(self, connection: Connection, epoch: int, pending: Pending) -> None:
        for attempt in range(1, self._limits.attempts_max + 1):
            try:
                await self._attempt(epoch, self._batch(connection, [pending], careful=True))
                return
            except _LOST:
                raise
            except (asyncpg.UniqueViolationError, BookOutdated) as e:
                # Another shard's transaction was first with this key: the next look finds it.
                await connection.execute("ROLLBACK")
                cause: Exception = e
            except Exception as e:
                await connection.execute("ROLLBACK")
                log.exception("operation_failed", kind=pending.operation.kind, key=pending.operation.key)
                cause = e
                break
            log.warning("operation_repeated", attempt=attempt, cause=type(cause).__name__)
        self._count(pending.operation.kind, Internal.default_code)
        self._fail(pending, Internal(detail=type(cause).__name__))

    async def _attempt(self, epoch: int, attempt: Batch, meanwhile: Callable[[], None] | None = None) -> None:
        try:
            journal = await attempt.run(self.shard, epoch, meanwhile)
        finally:
            self._look_no_more()
            self._answer_durable()
        self._durable = attempt.pendings, journal
        if self._ahead is None:
            self._answer_durable()
        else:
            self._loop.call_later(ANSWERED_WITHIN_S, self._answer_durable)

    def _answer_durable(self) -> None:
        if self._durable is None:
            return
        (batch, journal), self._durable = self._durable, None
        self._answer(batch)
        self._measure(batch, journal)
        failpoints.reached("batch_answered")

    def _answer(self, batch: Sequence[Pending]) -> None:
        for pending in batch:
            if pending.error is not None:
                self._fail(pending, pending.error)
                continue
            self._done(pending)
            for waiter in pending.waiters:
                if not waiter.done():
                    waiter.set_result(pending.result)
            pending.waiters.clear()

    def _fail(self, pending: Pending, error: TollgateError) -> None:
        self._done(pending)
        self._refuse(pending, error)

    def _refuse(self, pending: Pending, error: TollgateError) -> None:
        for waiter in pending.waiters:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # whoever waited may be gone: that is no fault
        pending.waiters.clear()

    def _done(self, pending: Pending) -> None:
        if pending.keys:
            key = (pending.operation.tenant.int, pending.keys[0])
            if self._under_way.get(key) is pending:
                del self._under_way[key]

    def _count(self, kind: str, result: str, times: int = 1) -> None:
        self._metrics.operations.labels(kind, result).inc(times)

    def _measure(self, batch: Sequence[Pending], journal: Journal) -> None:
        for (kind, outcome), times in Counter((p.operation.kind, p.outcome) for p in batch).items():
            self._count(kind, outcome, times)
        settled: Counter[tuple[str, str]] = Counter()
        for usage in journal.rows.usages:
            settled[usage.model, usage.build] += usage.cost
        for (model, build), cost in settled.items():
            self._metrics.credits_settled.labels(model, build).inc(cost / NANO_PER_CREDIT)
