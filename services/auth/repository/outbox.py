"""The outboxes: changes of keys and of sessions that Redis must hear of, and heard of lately."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select, update

from services.auth.domain import Event, KeyEvent, SessionEvent
from services.auth.tables import KeyOutboxRow, SessionOutboxRow
from shared.database import AsyncSession

Table = type[KeyOutboxRow] | type[SessionOutboxRow]
TABLES: tuple[Table, ...] = (SessionOutboxRow, KeyOutboxRow)


class OutboxRepository:
    """One of the outboxes."""

    def __init__(self, session: AsyncSession, table: Table) -> None:
        self._session = session
        self._table = table

    async def pending(self, limit: int) -> list[Event]:
        """Those that were not delivered, the oldest first."""
        table = self._table
        rows = await self._session.scalars(
            select(table).where(table.delivered_at.is_(None)).order_by(table.id).limit(limit)
        )
        return [_event(row) for row in rows]

    async def delivered_since(self, since: datetime, *, after_id: int, limit: int) -> list[Event]:
        """Those that were delivered from a time on, in the order of their ids, after one of them."""
        table = self._table
        rows = await self._session.scalars(
            select(table).where(table.delivered_at >= since, table.id > after_id).order_by(table.id).limit(limit)
        )
        return [_event(row) for row in rows]

    async def count_pending(self) -> int:
        statement = select(func.count()).select_from(self._table).where(self._table.delivered_at.is_(None))
        return int((await self._session.execute(statement)).scalar_one())

    async def mark_delivered(self, event_ids: Sequence[int], now: datetime) -> None:
        table = self._table
        await self._session.execute(update(table).where(table.id.in_(event_ids)).values(delivered_at=now))

    async def prune(self, before: datetime, batch_max: int) -> int:
        """Delete what was delivered before a time; at most `batch_max`. How many went."""
        table = self._table
        old = select(table.id).where(table.delivered_at < before).limit(batch_max)
        gone = await self._session.scalars(delete(table).where(table.id.in_(old)).returning(table.id))
        return len(gone.all())


def table_of(event: Event) -> Table:
    """The outbox in which an event stands."""
    return KeyOutboxRow if isinstance(event, KeyEvent) else SessionOutboxRow


def _event(row: object) -> Event:
    if isinstance(row, KeyOutboxRow):
        return KeyEvent(row.id, row.key_id, row.org_id, row.digest, row.version)
    assert isinstance(row, SessionOutboxRow)
    return SessionEvent(row.id, row.session_id, row.org_id, row.version)
