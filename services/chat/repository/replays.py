"""Results by idempotency key. A claim is one statement: of two requests with the same key one gets it."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncEngine

from services.chat.repository import available
from services.chat.tables import replay


class ReplayRepository:
    """Rows of chat.replay. `busy_s`: how long a claim outlives a process that died with it."""

    def __init__(self, engine: AsyncEngine, *, busy_s: float, kept_s: float) -> None:
        self._engine = engine
        self._busy = timedelta(seconds=busy_s)
        self._kept = timedelta(seconds=kept_s)

    async def claim(self, org_id: str, key: str, fingerprint: bytes, attempt: str) -> bool:
        """Whether this attempt has the key now: it is new, has expired, or its last holder died."""
        new = upsert(replay).values(
            org_id=org_id,
            key=key,
            fingerprint=fingerprint,
            attempt=attempt,
            busy_until=func.now() + self._busy,
            expires_at=func.now() + self._kept,
        )
        left_alone = and_(
            replay.c.result.is_(None), replay.c.busy_until <= func.now(), replay.c.fingerprint == fingerprint
        )
        statement = new.on_conflict_do_update(
            index_elements=["org_id", "key"],
            set_={
                "fingerprint": new.excluded.fingerprint,
                "attempt": new.excluded.attempt,
                "busy_until": new.excluded.busy_until,
                "result": None,
                "expires_at": new.excluded.expires_at,
            },
            where=or_(replay.c.expires_at <= func.now(), left_alone),
        ).returning(replay.c.attempt)
        with available():
            async with self._engine.begin() as connection:
                held_by: str | None = (await connection.execute(statement)).scalar_one_or_none()
        return held_by == attempt

    async def find(self, org_id: str, key: str) -> tuple[bytes, bytes | None] | None:
        """(fingerprint, result); the result is None while its request runs."""
        statement = select(replay.c.fingerprint, replay.c.result).where(*_one(org_id, key))
        with available():
            async with self._engine.connect() as connection:
                row = (await connection.execute(statement)).one_or_none()
        return None if row is None else (row[0], row[1])

    async def finish(self, org_id: str, key: str, attempt: str, result: bytes) -> None:
        """Keep the result."""
        statement = update(replay).where(*_one(org_id, key), replay.c.attempt == attempt)
        with available():
            async with self._engine.begin() as connection:
                await connection.execute(statement.values(result=result, busy_until=None))

    async def release(self, org_id: str, key: str, attempt: str) -> None:
        """Nothing came of it: the key is free again."""
        with available():
            async with self._engine.begin() as connection:
                await connection.execute(delete(replay).where(*_one(org_id, key), replay.c.attempt == attempt))

    async def purge(self, limit: int) -> int:
        """Delete what has expired, at most `limit` rows; how many."""
        due = select(replay.c.org_id, replay.c.key).where(replay.c.expires_at <= func.now()).limit(limit).subquery()
        expired = and_(replay.c.org_id == due.c.org_id, replay.c.key == due.c.key)
        with available():
            async with self._engine.begin() as connection:
                return (await connection.execute(delete(replay).where(expired))).rowcount


def _one(org_id: str, key: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return replay.c.org_id == org_id, replay.c.key == key
