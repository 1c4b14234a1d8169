"""The outbox of key changes: delivered by the request that made them, or else by a task until Redis has them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.clients import KeyChannel
from services.auth.domain import KeyEvent
from services.auth.errors import RedisDown
from services.auth.repository.keys import OutboxRepository
from shared.database import AsyncSession
from shared.telemetry import AuthMetrics, get_logger

log = get_logger(__name__)


class Outbox:
    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], channel: KeyChannel, metrics: AuthMetrics, batch_max: int
    ) -> None:
        self._sessions = sessions
        self._channel = channel
        self._metrics = metrics
        self._batch_max = batch_max

    async def deliver(self, events: Sequence[KeyEvent]) -> None:
        """Tell Redis now, before the caller hears that the change is done. Redis being away is not an error here:
        the rows stay, `deliver_pending` has them, and gateways that cannot reach Redis ask PostgreSQL.
        """
        for start in range(0, len(events), self._batch_max):
            batch = events[start : start + self._batch_max]
            try:
                await self._channel.announce(batch)
            except RedisDown as e:
                log.warning("outbox_delayed", events=len(events) - start, reason=e.detail)
                return
            await self._remove(batch)

    async def deliver_pending(self) -> bool:
        """Deliver one batch, oldest first; whether there may be more. Raises RedisDown."""
        async with self._sessions() as session:
            repository = OutboxRepository(session)
            events = await repository.pending(self._batch_max)
            self._metrics.outbox_pending.set(await repository.count() if events else 0)
        if not events:
            return False
        await self._channel.announce(events)
        await self._remove(events)
        return len(events) == self._batch_max

    async def _remove(self, events: Sequence[KeyEvent]) -> None:
        async with self._sessions.begin() as session:
            await OutboxRepository(session).remove([event.id for event in events])
