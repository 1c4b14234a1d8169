"""Counted attempts to sign in. What they are counted for is a keyed digest: the table tells no names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from services.auth.domain import AttemptCount
from services.auth.repository.sign_in import Connection

# One statement makes what is missing and locks all of them, always in the same order.
_LOCK = """
    INSERT INTO auth.sign_in_attempt AS held (subject, failures, since)
    SELECT subject, 0, $2 FROM unnest($1::text[]) AS wanted (subject) ORDER BY subject
    ON CONFLICT (subject) DO UPDATE SET failures = held.failures
    RETURNING subject, failures, since, blocked_until
"""
_PUT = """
    UPDATE auth.sign_in_attempt held
    SET failures = new.failures, since = new.since, blocked_until = new.blocked_until
    FROM unnest($1::text[], $2::int[], $3::timestamptz[], $4::timestamptz[])
        AS new (subject, failures, since, blocked_until)
    WHERE held.subject = new.subject
"""
# A block that another failure made in the meantime stays.
_TAKE_BACK = """
    WITH locked AS (
        SELECT held.subject, held.failures, mine.blocked_until AS mine
        FROM auth.sign_in_attempt held
        JOIN unnest($1::text[], $2::timestamptz[]) AS mine (subject, blocked_until) ON mine.subject = held.subject
        ORDER BY held.subject FOR UPDATE OF held
    ),
    forgotten AS (
        DELETE FROM auth.sign_in_attempt held USING locked
        WHERE held.subject = locked.subject AND (locked.failures <= 1 OR locked.subject = ANY ($3::text[]))
    )
    UPDATE auth.sign_in_attempt held
    SET failures = held.failures - 1, blocked_until = nullif(held.blocked_until, locked.mine)
    FROM locked
    WHERE held.subject = locked.subject AND locked.failures > 1 AND locked.subject <> ALL ($3::text[])
"""
_PRUNE = """
    WITH old AS (SELECT subject FROM auth.sign_in_attempt WHERE since < $1 LIMIT $2),
    gone AS (DELETE FROM auth.sign_in_attempt held USING old WHERE held.subject = old.subject RETURNING 1)
    SELECT count(*) FROM gone
"""


class AttemptRepository:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock(self, subjects: Iterable[str], now: datetime) -> dict[str, AttemptCount]:
        """The counts of subjects, made where there were none, locked until the transaction ends."""
        rows = await self._connection.fetch(_LOCK, list(subjects), now)
        return {subject: AttemptCount(failures, since, until) for subject, failures, since, until in rows}

    async def put(self, counts: Mapping[str, AttemptCount]) -> None:
        """Write counts of locked subjects."""
        await self._connection.execute(
            _PUT,
            list(counts),
            [count.failures for count in counts.values()],
            [count.since for count in counts.values()],
            [count.blocked_until for count in counts.values()],
        )

    async def take_back(self, blocks: Mapping[str, datetime | None], forgotten: Iterable[str]) -> None:
        """One failure less of each subject, without the block that it made; those to be forgotten go altogether."""
        await self._connection.execute(_TAKE_BACK, list(blocks), list(blocks.values()), list(forgotten))

    async def prune(self, before: datetime, batch_max: int) -> int:
        """Delete counts that began before a time; at most `batch_max`. How many went."""
        gone: int = await self._connection.fetchval(_PRUNE, before, batch_max)
        return gone
