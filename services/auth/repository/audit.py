"""The audit log: it is added to and read, never changed."""

from __future__ import annotations

from datetime import datetime, timedelta
from ipaddress import ip_address
from uuid import UUID

from sqlalchemy import insert, select

from services.auth.domain import AuditEntry, AuditFilter, AuditLine, Origin
from services.auth.tables import AuditRow
from shared import ids
from shared.database import AsyncSession

ID_MARGIN = timedelta(minutes=1)  # a transaction lives seconds


async def append(session: AsyncSession, entry: AuditEntry, at: datetime) -> None:
    """Record an act in the transaction of the act itself."""
    await session.execute(
        insert(AuditRow).values(
            id=ids.uuid7(),
            at=at,
            action=entry.action,
            actor_user_id=entry.actor_user_id,
            actor_key_id=entry.actor_key_id,
            org_id=entry.org_id,
            target_type=entry.target_type,
            target_id=entry.target_id,
            request_id=entry.origin.request_id,
            address=ip_address(entry.origin.address) if entry.origin.address else None,
            details=dict(entry.details),
        )
    )


async def page(session: AsyncSession, wanted: AuditFilter, *, before: UUID | None, limit: int) -> list[AuditLine]:
    """The lines of every organisation that pass the filter, made before one, newest first."""
    statement = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    for column, value in (
        (AuditRow.actor_user_id, wanted.actor_user_id),
        (AuditRow.org_id, wanted.org_id),
        (AuditRow.action, wanted.action),
    ):
        if value is not None:
            statement = statement.where(column == value)
    # Lines are sorted by their ids, which begin with the time of writing: within seconds of `at`, and indexed.
    if wanted.since is not None:
        statement = statement.where(AuditRow.at >= wanted.since, AuditRow.id >= _first_id(wanted.since - ID_MARGIN))
    if wanted.until is not None:
        statement = statement.where(AuditRow.at < wanted.until, AuditRow.id < _first_id(wanted.until + ID_MARGIN))
    if before is not None:
        statement = statement.where(AuditRow.id < before)
    return [_line(row) for row in await session.scalars(statement)]


def _line(row: AuditRow) -> AuditLine:
    origin = Origin(row.request_id, str(row.address) if row.address else None)
    entry = AuditEntry(
        action=row.action,
        target_type=row.target_type,
        target_id=row.target_id,
        actor_user_id=row.actor_user_id,
        actor_key_id=row.actor_key_id,
        org_id=row.org_id,
        origin=origin,
        details=row.details,
    )
    return AuditLine(row.id, row.at, entry)


def _first_id(at: datetime) -> UUID:
    """The smallest UUID that begins with a time's millisecond."""
    return UUID(int=int(at.timestamp() * 1000) << 80)
