"""Makes the next months' partitions ahead of time (docs/decisions/0012), and says how far they reach."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from services.billing.repository.database import Database
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)


class PartitionMaker:
    """Any number of them may run at once. `months_ahead` is from 1 to 24."""

    def __init__(self, database: Database, metrics: BillingMetrics, *, months_ahead: int, interval_s: float) -> None:
        self._database = database
        self._metrics = metrics
        self._months_ahead = months_ahead
        self._interval_s = interval_s

    async def run(self) -> None:
        """Make them for ever. A database that is away is tried again by the runtime."""
        while True:
            await self.make()
            await asyncio.sleep(self._interval_s)

    async def make(self) -> None:
        """Make what is missing. Raises LedgerUnavailable."""
        row = await self._database.fetchrow(
            "SELECT horizon, strays FROM billing.make_partitions($1)", self._months_ahead
        )
        ahead_s = (row["horizon"] - datetime.now(UTC)).total_seconds()
        self._metrics.partition_horizon.set(ahead_s)
        self._metrics.partition_strays.set(row["strays"])
        if row["strays"]:
            log.warning("rows_outside_partitions", rows=row["strays"])
