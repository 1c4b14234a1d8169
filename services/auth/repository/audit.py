"""The audit log: it is only ever added to."""

from __future__ import annotations

from datetime import datetime
from ipaddress import ip_address

from sqlalchemy import insert

from services.auth.domain import AuditEntry
from services.auth.tables import AuditRow
from shared import ids
from shared.database import AsyncSession


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
