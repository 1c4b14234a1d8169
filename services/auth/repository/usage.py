"""When keys were last used, and for how much by day."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from uuid import UUID

from sqlalchemy import delete, select, text, tuple_

from services.auth.domain import DailyUse
from services.auth.tables import KeyUsageRow
from shared.database import AsyncSession

_NOTE_LAST = text(
    """
    UPDATE auth.api_key k SET last_used_at = u.at
    FROM unnest(CAST(:ids AS uuid[]), CAST(:times AS timestamptz[])) AS u (id, at)
    WHERE k.id = u.id AND (k.last_used_at IS NULL OR k.last_used_at < u.at)
    """
)
# Keys that are none of ours are left out: the stream is written by gateways, but nobody vouches for its past.
_ADD = text(
    """
    INSERT INTO auth.key_usage AS held (key_id, day, requests, client_errors, server_errors, bytes_in, bytes_out)
    SELECT u.* FROM unnest(
        CAST(:ids AS uuid[]), CAST(:days AS date[]), CAST(:requests AS bigint[]), CAST(:client_errors AS bigint[]),
        CAST(:server_errors AS bigint[]), CAST(:bytes_in AS bigint[]), CAST(:bytes_out AS bigint[])
    ) AS u (key_id, day, requests, client_errors, server_errors, bytes_in, bytes_out)
    WHERE EXISTS (SELECT FROM auth.api_key k WHERE k.id = u.key_id)
    ORDER BY u.key_id, u.day
    ON CONFLICT (key_id, day) DO UPDATE SET
        requests = held.requests + excluded.requests,
        client_errors = held.client_errors + excluded.client_errors,
        server_errors = held.server_errors + excluded.server_errors,
        bytes_in = held.bytes_in + excluded.bytes_in,
        bytes_out = held.bytes_out + excluded.bytes_out
    """
)


async def note_last_uses(session: AsyncSession, uses: Mapping[UUID, datetime]) -> None:
    """Move the last use of keys forward, never back. No change that the gateway must hear of."""
    ordered = sorted(uses.items())
    await session.execute(_NOTE_LAST, {"ids": [key for key, _ in ordered], "times": [at for _, at in ordered]})


async def add_uses(session: AsyncSession, uses: Mapping[UUID, list[DailyUse]]) -> None:
    """Add to what is known of each key and day."""
    rows = [(key_id, use) for key_id, days in uses.items() for use in days]
    await session.execute(
        _ADD,
        {
            "ids": [key_id for key_id, _ in rows],
            "days": [use.day for _, use in rows],
            "requests": [use.requests for _, use in rows],
            "client_errors": [use.client_errors for _, use in rows],
            "server_errors": [use.server_errors for _, use in rows],
            "bytes_in": [use.bytes_in for _, use in rows],
            "bytes_out": [use.bytes_out for _, use in rows],
        },
    )


async def uses_of(session: AsyncSession, key_id: UUID, since: date) -> list[DailyUse]:
    """The days from one on that the key was used on, the latest first."""
    rows = await session.scalars(
        select(KeyUsageRow)
        .where(KeyUsageRow.key_id == key_id, KeyUsageRow.day >= since)
        .order_by(KeyUsageRow.day.desc())
    )
    return [
        DailyUse(row.day, row.requests, row.client_errors, row.server_errors, row.bytes_in, row.bytes_out)
        for row in rows
    ]


async def prune_uses(session: AsyncSession, before: date, batch_max: int) -> int:
    """Delete days before one; at most `batch_max`. How many went."""
    row = tuple_(KeyUsageRow.key_id, KeyUsageRow.day)
    old = select(KeyUsageRow.key_id, KeyUsageRow.day).where(KeyUsageRow.day < before).limit(batch_max)
    gone = await session.scalars(delete(KeyUsageRow).where(row.in_(old)).returning(KeyUsageRow.day))
    return len(gone.all())
