"""The ledger of this process: writers of the shards that it leads, and the way to those that others lead.

Wallets are divided into a fixed number of shards by their id. Each shard has one leader among all processes; who comes
to another one is sent on. Processes share the shards evenly: each takes free ones up to its share and gives back
what is above it, so that one that starts gets its part, and one that dies loses all of them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from services.billing.errors import LedgerUnavailable
from services.billing.ledger import failpoints
from services.billing.ledger.batch import Fenced
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from services.billing.ledger.writer import NotLeading, ShardWriter, WriterLimits
from services.billing.repository import leadership
from services.billing.repository.database import TRANSIENT, Connection, Database
from services.billing.repository.leadership import ShardsDiffer, shard_of
from shared.errors import Timeout, Unavailable
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)


class Peers(Protocol):
    """The other processes."""

    async def forward(self, address: str, operation: Operation) -> Result:
        """What `ShardWriter.enqueue` of the process there answers. Raises its refusal, NotLeading, Unavailable."""


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """How shards are shared, and every wait for that."""

    shards: int = 2
    balance_interval_s: float = 0.25
    lock_interval_s: float = 0.1
    retry_s: float = 0.02
    leaders_age_max_s: float = 0.5
    connect_timeout_s: float = 5.0
    drain_timeout_s: float = 10.0
    statement_timeout_ms: int = 10_000


class Shards:
    """The `Ledger` of a process that others reach at `address`. `run` must run beside it."""

    def __init__(
        self,
        database: Database,
        url: str,
        peers: Peers,
        *,
        address: str,
        signup_credits: int,
        metrics: BillingMetrics,
        limits: ShardLimits | None = None,
        writer_limits: WriterLimits | None = None,
    ) -> None:
        self._database = database
        self._url = url
        self._peers = peers
        self._address = address
        self._limits = limits or ShardLimits()
        self._writer_limits = writer_limits or WriterLimits()
        self._writers = [
            ShardWriter(n, signup_credits=signup_credits, metrics=metrics, limits=self._writer_limits)
            for n in range(self._limits.shards)
        ]
        self._led: dict[int, asyncio.Event] = {}
        self._wanted = 0
        self._taken: set[int] = set()
        self._leaders: Mapping[int, str] = {}
        self._leaders_read_s = float("-inf")

    @property
    def count(self) -> int:
        """How many shards there are in all."""
        return self._limits.shards

    @property
    def led(self) -> list[int]:
        """The shards that this process leads."""
        return [writer.shard for writer in self._writers if writer.accepts]

    def writer_of(self, wallet_id: UUID) -> ShardWriter:
        return self._writers[shard_of(wallet_id, self._limits.shards)]

    async def submit(self, operation: Operation) -> Result:
        """See `services.billing.ledger.writer.Ledger`."""
        writer = self.writer_of(operation.wallet_id)
        give_up_s = time.monotonic() + self._writer_limits.operation_timeout_s
        while True:
            if writer.accepts:
                with contextlib.suppress(NotLeading):  # leadership has just changed
                    return await writer.enqueue(operation)
            try:
                leader = await self._leader(writer.shard)
                if leader and leader != self._address:
                    return await self._peers.forward(leader, operation)
            except (Unavailable, Timeout) as e:
                if e.code == "billing_overloaded":
                    raise
            if time.monotonic() > give_up_s:
                raise LedgerUnavailable(detail="nobody leads the wallet's shard", retry_after_s=1)
            await asyncio.sleep(self._limits.retry_s)

    def enqueue(self, operation: Operation) -> asyncio.Future[Result]:
        """`submit` for callers that have many at once: no task for those that are decided here."""
        writer = self.writer_of(operation.wallet_id)
        return writer.enqueue(operation) if writer.accepts else asyncio.ensure_future(self.submit(operation))

    async def addresses(self) -> list[str]:
        """Where the leader of each shard was last known to listen; empty where nobody has led yet."""
        return [self._address if w.accepts else await self._leader(w.shard) for w in self._writers]

    async def check(self) -> None:
        """Raise unless every shard has a leader: for /readyz."""
        if not all(await self.addresses()):
            raise LedgerUnavailable(detail="a shard has no leader")

    async def run(self) -> None:
        """Lead what is this process's share, for ever. Cancelled, it first finishes what was accepted."""
        work = asyncio.create_task(self._run())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await self._drain()
            work.cancel()
            await asyncio.wait([work])
            raise

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._balance())
            for writer in self._writers:
                tasks.create_task(writer.watch())
                tasks.create_task(self._lead(writer))

    async def _drain(self) -> None:
        """Callers may be gone; their operations are done all the same."""
        give_up_s = time.monotonic() + self._limits.drain_timeout_s
        while any(writer.waiting for writer in self._writers) and time.monotonic() < give_up_s:  # noqa: ASYNC110
            await asyncio.sleep(self._limits.retry_s)  # once in the life of a process: an event would cost every batch

    async def _leader(self, shard: int) -> str:
        now = time.monotonic()
        if now - self._leaders_read_s > self._limits.leaders_age_max_s:
            self._leaders_read_s = now
            self._leaders = await leadership.leaders(self._database)
        return self._leaders.get(shard, "")

    async def _balance(self) -> None:
        """Keep `_wanted` at this process's share; give back one shard at a time when it has more."""
        while True:
            try:
                connection = await self._connect()
                try:
                    await leadership.agree_on_shards(connection, self._limits.shards)
                    await leadership.join(connection)
                    while True:
                        self._wanted = -(-self._limits.shards // await leadership.members(connection))
                        self._taken = await leadership.taken(connection)
                        if len(self._led) > self._wanted:
                            self._led[max(self._led)].set()
                        await asyncio.sleep(self._limits.balance_interval_s)
                finally:
                    connection.terminate()
            except ShardsDiffer as e:
                log.error("shards_differ", detail=str(e))
            except TRANSIENT as e:
                log.warning("database_interrupted", cause=type(e).__name__)
            await asyncio.sleep(self._limits.balance_interval_s)

    async def _lead(self, writer: ShardWriter) -> None:
        while True:
            if len(self._led) >= self._wanted or writer.shard in self._taken:
                writer.release()
            else:
                try:
                    await self._term(writer)
                except Fenced:
                    log.warning("shard_fenced", shard=writer.shard)
                    writer.release()
                except ShardsDiffer as e:
                    log.error("shards_differ", detail=str(e))
                    writer.release()
                except TRANSIENT as e:
                    log.warning("shard_interrupted", shard=writer.shard, cause=type(e).__name__)
            await asyncio.sleep(self._limits.lock_interval_s)

    async def _term(self, writer: ShardWriter) -> None:
        """Lead the shard, if nobody does, until it is to be given back or the connection breaks."""
        connection = await self._connect()
        try:
            if len(self._led) >= self._wanted or not await leadership.try_to_lock(connection, writer.shard):
                writer.release()
                return
            giving_back = self._led[writer.shard] = asyncio.Event()
            failpoints.reached("shard_locked")
            epoch = await leadership.raise_epoch(connection, writer.shard, self._limits.shards, self._address)
            log.info("shard_led", shard=writer.shard, epoch=epoch)
            failpoints.reached("shard_led")
            await writer.serve(connection, epoch, giving_back)
            writer.release()
            log.info("shard_given_back", shard=writer.shard, epoch=epoch)
        finally:
            self._led.pop(writer.shard, None)
            self._taken.discard(writer.shard)
            connection.terminate()
            failpoints.reached("shard_released")

    async def _connect(self) -> Connection:
        limits = self._limits
        return await leadership.connect(
            self._url, timeout_s=limits.connect_timeout_s, statement_timeout_ms=limits.statement_timeout_ms
        )
