"""How keys are used: learnt from the gateways' events, in batches, never during a request.

For people to look at, not to bill by: events that do not reach Redis, or whose reader dies with them, are missing.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.clients import UsageStream
from services.auth.domain import Actor, DailyUse
from services.auth.repository import usage
from services.auth.repository.keys import KeyRepository
from shared.clock import Clock
from shared.database import AsyncSession


class KeyUsage:
    """`keep_days`: how long days are kept."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        stream: UsageStream,
        clock: Clock,
        *,
        batch_max: int,
        keep_days: int,
    ) -> None:
        self._sessions = sessions
        self._stream = stream
        self._clock = clock
        self._batch_max = batch_max
        self._keep_days = keep_days

    async def note_batch(self) -> bool:
        """Take one batch of events; whether there may be more. Raises RedisDown."""
        batch = await self._stream.read(self._batch_max)
        if batch.last_uses:
            minutes = {key_id: at.replace(second=0, microsecond=0) for key_id, at in batch.last_uses.items()}
            async with self._sessions.begin() as session:
                await usage.note_last_uses(session, minutes)
                await usage.add_uses(session, batch.daily_uses)
        return batch.events == self._batch_max

    async def of_key(self, actor: Actor, key_id: UUID, *, days: int) -> list[DailyUse]:
        """The days that a key was used on, today and those before, the latest first. Raises KeyNotFound."""
        actor.identity.require_scope("keys:read")
        since = self._clock.now().date() - timedelta(days=days - 1)
        async with self._sessions() as session:
            await KeyRepository(session, tenant=actor.org_id, owner=actor.keys_of).get(key_id)
            return await usage.uses_of(session, key_id, since)

    async def prune(self) -> bool:
        """Delete one batch of days that are too old; whether there may be more."""
        before = self._clock.now().date() - timedelta(days=self._keep_days)
        async with self._sessions.begin() as session:
            return await usage.prune_uses(session, before, self._batch_max) == self._batch_max
