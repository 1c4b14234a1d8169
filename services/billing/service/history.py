"""What happened to a wallet: pages for people, and the whole of it as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import date, datetime, timedelta
from uuid import UUID

from services.billing.errors import TooManyExports
from services.billing.repository import history as repository
from services.billing.repository.database import Database
from services.billing.repository.history import AuditEntry, TransactionFilter, TransactionRow, UsageRecord, UsageSum
from services.billing.repository.wallets import seq_before
from shared.clock import Clock
from shared.errors import InvalidRequest

SCANNED_MAX = 10_000  # transfers that one page looks at, however few of them a filter lets through
EXPORT_PAGE = 1_000
SUMS_MAX = 1_000
DAYS_MAX = 366


class History:
    """One for the life of the process."""

    def __init__(self, database: Database, clock: Clock, *, exports_max: int) -> None:
        self._database = database
        self._clock = clock
        self._exports_max = exports_max
        self._exports = 0

    async def transactions(
        self,
        org_id: UUID,
        wanted: TransactionFilter,
        *,
        before_seq: int | None,
        since: datetime | None,
        until: datetime | None,
        limit: int,
    ) -> tuple[list[TransactionRow], int | None]:
        """A page, newest first, and where the next one begins; None at the end.

        A page of a filter that few pass may be short, even empty, and still have a next one. `since` is included,
        `until` is not.
        """
        first, last = await self._range(org_id, since, until)
        if before_seq is not None:
            last = min(last, before_seq - 1)
        lowest = max(first, last - SCANNED_MAX)
        rows = await repository.transactions(self._database, org_id, wanted, after=lowest, until=last, limit=limit + 1)
        if len(rows) > limit:
            return rows[:limit], rows[limit - 1].seq
        return rows, lowest + 1 if lowest > first else None

    async def export(
        self, org_id: UUID, wanted: TransactionFilter, *, since: datetime | None, until: datetime | None
    ) -> AsyncIterator[list[TransactionRow]]:
        """Everything up to this moment, oldest first, in pieces that are read as they are taken.

        No connection and no transaction is held meanwhile: what is numbered does not change. Raises TooManyExports at
        once. The iterator has to be closed.
        """
        if self._exports >= self._exports_max:
            raise TooManyExports(retry_after_s=5)
        after, last = await self._range(org_id, since, until)
        return self._pieces(org_id, wanted, after, last)

    async def audit(self, org_id: UUID, *, before: UUID | None, limit: int) -> tuple[list[AuditEntry], UUID | None]:
        """What was done by hand, newest first, and where the next page begins; None at the end."""
        rows = await repository.audit(self._database, org_id, before=before, limit=limit + 1)
        return rows[:limit], rows[limit - 1].id if len(rows) > limit else None

    async def usage(
        self, org_id: UUID, *, before: tuple[UUID, int] | None, limit: int
    ) -> tuple[list[UsageRecord], tuple[UUID, int] | None]:
        """A page, newest first, and where the next one begins; None at the end."""
        rows = await repository.usage(self._database, org_id, before=before, limit=limit + 1)
        last = rows[limit - 1] if len(rows) > limit else None
        return rows[:limit], (last.hold_id, last.part) if last else None

    async def usage_sums(
        self, org_id: UUID, *, since: date | None, until: date | None, groups: Sequence[str]
    ) -> tuple[list[UsageSum], bool]:
        """Sums by any of GROUPS, of this month if no days are given; and whether there are more than SUMS_MAX.

        Raises InvalidRequest for more than DAYS_MAX days.
        """
        since = since or self._clock.now().date().replace(day=1)
        until = until or max(self._clock.now().date(), since) + timedelta(days=1)
        if not timedelta(0) < until - since <= timedelta(days=DAYS_MAX):
            raise InvalidRequest(f"from lies before to, by at most {DAYS_MAX} days.", param="from")
        rows = await repository.usage_sums(self._database, org_id, since, until, groups, SUMS_MAX + 1)
        return rows[:SUMS_MAX], len(rows) > SUMS_MAX

    async def _pieces(
        self, org_id: UUID, wanted: TransactionFilter, after: int, last: int
    ) -> AsyncIterator[list[TransactionRow]]:
        self._exports += 1
        try:
            while after < last:
                upper = min(last, after + SCANNED_MAX)
                rows = await repository.transactions(
                    self._database,
                    org_id,
                    wanted,
                    after=after,
                    until=upper,
                    limit=EXPORT_PAGE,
                    newest_first=False,
                )
                after = rows[-1].seq if len(rows) == EXPORT_PAGE else upper
                if rows:
                    yield rows
        finally:
            self._exports -= 1

    async def _range(self, org_id: UUID, since: datetime | None, until: datetime | None) -> tuple[int, int]:
        """The numbers of the transfers of a time: from the first (not included) to the last."""
        first = 0 if since is None else await seq_before(self._database, org_id, since)
        if until is None:
            return first, await repository.last_seq(self._database, org_id)
        return first, await seq_before(self._database, org_id, until)
