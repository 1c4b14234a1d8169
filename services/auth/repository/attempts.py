"""Counted attempts to sign in. What they are counted for is a keyed digest: the table tells no names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from sqlalchemy import delete, select, text

from services.auth.domain import AttemptCount
from services.auth.tables import SignInAttemptRow
from shared.database import AsyncSession

# One statement makes what is missing and locks all of them, always in the same order.
_LOCK = text(
    """
    INSERT INTO auth.sign_in_attempt AS held (subject, failures, since)
    SELECT subject, 0, :now FROM unnest(CAST(:subjects AS text[])) AS wanted (subject) ORDER BY subject
    ON CONFLICT (subject) DO UPDATE SET failures = held.failures
    RETURNING subject, failures, since, blocked_until
    """
)
_PUT = text(
    """
    UPDATE auth.sign_in_attempt held
    SET failures = new.failures, since = new.since, blocked_until = new.blocked_until
    FROM unnest(
        CAST(:subjects AS text[]), CAST(:failures AS int[]),
        CAST(:sinces AS timestamptz[]), CAST(:untils AS timestamptz[])
    ) AS new (subject, failures, since, blocked_until)
    WHERE held.subject = new.subject
    """
)


class AttemptRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def lock(self, subjects: Iterable[str], now: datetime) -> dict[str, AttemptCount]:
        """The counts of subjects, made where there were none, locked until the transaction ends."""
        rows = await self._session.execute(_LOCK, {"subjects": list(subjects), "now": now})
        return {subject: AttemptCount(failures, since, until) for subject, failures, since, until in rows}

    async def put(self, counts: Mapping[str, AttemptCount]) -> None:
        """Write counts of locked subjects."""
        await self._session.execute(
            _PUT,
            {
                "subjects": list(counts),
                "failures": [count.failures for count in counts.values()],
                "sinces": [count.since for count in counts.values()],
                "untils": [count.blocked_until for count in counts.values()],
            },
        )

    async def remove(self, subjects: Sequence[str]) -> None:
        """Forget counts."""
        await self._session.execute(delete(SignInAttemptRow).where(SignInAttemptRow.subject.in_(subjects)))

    async def prune(self, before: datetime, batch_max: int) -> int:
        """Delete counts that began before a time; at most `batch_max`. How many went."""
        old = select(SignInAttemptRow.subject).where(SignInAttemptRow.since < before).limit(batch_max)
        gone = await self._session.scalars(
            delete(SignInAttemptRow).where(SignInAttemptRow.subject.in_(old)).returning(SignInAttemptRow.subject)
        )
        return len(gone.all())
