"""When keys were last used: learnt from the gateways' events, in batches, to the minute, never during a request."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import async_sessionmaker

from services.auth.clients import UsageStream
from services.auth.repository.keys import note_uses
from shared.database import AsyncSession


class LastUse:
    def __init__(self, sessions: async_sessionmaker[AsyncSession], stream: UsageStream, batch_max: int) -> None:
        self._sessions = sessions
        self._stream = stream
        self._batch_max = batch_max

    async def note_batch(self) -> bool:
        """Take one batch of events; whether there may be more. Raises RedisDown."""
        events, uses = await self._stream.read(self._batch_max)
        if uses:
            minutes = {key_id: at.replace(second=0, microsecond=0) for key_id, at in uses.items()}
            async with self._sessions.begin() as session:
                await note_uses(session, minutes)
        return events == self._batch_max
