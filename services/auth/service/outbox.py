"""The outbox of changed keys and sessions: delivered by the request that changed them, or else by a task until Redis
has them.

A failover of Redis may lose what it had been told last, and with it a revocation: a gateway would find the older
version there and believe it. So what was delivered is kept for as long as a version is cached; and when the server
behind the address is another one than before (it names itself by a run id), or this process has just begun, what of it
Redis does not know is said again, for a while: until no connection can be left that still speaks to the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.clients import ChangeChannel
from services.auth.domain import Event
from services.auth.errors import RedisDown
from services.auth.repository.outbox import TABLES, OutboxRepository, Table, table_of
from shared import apikeys
from shared.clock import Clock
from shared.database import AsyncSession
from shared.telemetry import AuthMetrics, get_logger

log = get_logger(__name__)

KEEP_MARGIN_S = 60  # between the clocks of replicas, and for a fill that was under way


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Events a batch; how long everything is said again after a failover; rows deleted at once."""

    batch_max: int
    repeat_s: int
    prune_batch_max: int


class Outbox:
    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        channel: ChangeChannel,
        clock: Clock,
        metrics: AuthMetrics,
        limits: OutboxLimits,
    ) -> None:
        self._sessions = sessions
        self._channel = channel
        self._clock = clock
        self._metrics = metrics
        self._limits = limits
        self._server = ""
        self._repeat_until_s = float("-inf")

    async def deliver(self, events: Sequence[Event]) -> None:
        """Tell Redis now, before the caller hears that the change is done. Redis being away is not an error here:
        the rows stay, `deliver_pending` has them, and gateways that cannot reach Redis ask PostgreSQL.
        """
        batch_max = self._limits.batch_max
        for start in range(0, len(events), batch_max):
            batch = events[start : start + batch_max]
            try:
                await self._channel.announce(batch)
            except RedisDown as e:
                log.warning("outbox_delayed", events=len(events) - start, reason=e.detail)
                return
            await self._mark_delivered(batch)

    async def deliver_pending(self) -> bool:
        """Deliver one batch of each outbox, oldest first, and repeat what a failover may have lost; whether there may
        be more. Raises RedisDown.
        """
        await self._repeat_after_failover()
        batches, waiting = [], 0
        async with self._sessions() as session:
            for table in TABLES:
                repository = OutboxRepository(session, table)
                batches.append(events := await repository.pending(self._limits.batch_max))
                waiting += await repository.count_pending() if events else 0
        self._metrics.outbox_pending.set(waiting)
        for events in batches:
            if events:
                await self._channel.announce(events)
                await self._mark_delivered(events)
        return any(len(events) == self._limits.batch_max for events in batches)

    async def prune(self) -> bool:
        """Delete one batch of what no cache can contradict any more; whether there may be more."""
        batch_max = self._limits.prune_batch_max
        async with self._sessions.begin() as session:
            gone = [await OutboxRepository(session, table).prune(self._kept_since(), batch_max) for table in TABLES]
        return batch_max in gone

    async def _repeat_after_failover(self) -> None:
        server = await self._channel.server()
        now_s = self._clock.monotonic_s()
        if server != self._server:
            self._server, self._repeat_until_s = server, now_s + self._limits.repeat_s
        if now_s <= self._repeat_until_s:
            for table in TABLES:
                await self._repeat(table)

    async def _repeat(self, table: Table) -> None:
        last_id = 0
        while True:
            async with self._sessions() as session:
                events = await OutboxRepository(session, table).delivered_since(
                    self._kept_since(), after_id=last_id, limit=self._limits.batch_max
                )
            if events:
                await self._channel.repeat(events)
                last_id = events[-1].id
            if len(events) < self._limits.batch_max:
                return

    def _kept_since(self) -> datetime:
        return self._clock.now() - timedelta(seconds=apikeys.CACHE_TTL_S + KEEP_MARGIN_S)

    async def _mark_delivered(self, events: Sequence[Event]) -> None:
        now = self._clock.now()
        async with self._sessions.begin() as session:
            for table in TABLES:
                if event_ids := [event.id for event in events if table_of(event) is table]:
                    await OutboxRepository(session, table).mark_delivered(event_ids, now)
