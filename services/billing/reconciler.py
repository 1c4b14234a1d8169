"""The reconciler: walks through the books for ever, a bounded part at a time, and freezes what does not add up.

Where it is, is in the database: it goes on there after a restart, and of several processes one does a pass. A wallet
with a difference is frozen (no new holds or charges; what is in flight is settled), the difference is written to
`billing.discrepancy`, logged and counted. Nothing is ever repaired here: what is wrong, and why, is for people to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from uuid import UUID

import orjson

from services.billing.repository.checks import CHECKS
from services.billing.repository.database import Connection, Database
from services.billing.repository.verification import Begun, Difference, Step, holds_step, wallets_step
from shared.ids import uuid7
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)

Walk = Literal["wallets", "holds"]
LOCK_ID = 0x7011_4EC0


@dataclass(frozen=True, slots=True)
class ReconcilerLimits:
    """How much a pass looks at, and the pause after it."""

    interval_s: float = 5.0
    wallets_max: int = 200
    transfers_max: int = 5_000
    holds_max: int = 2_000


class Reconciler:
    """One a process. `database` is that of the service."""

    def __init__(self, database: Database, metrics: BillingMetrics, limits: ReconcilerLimits | None = None) -> None:
        self._database = database
        self._metrics = metrics
        self._limits = limits or ReconcilerLimits()
        for check in CHECKS:  # an alert needs to see the first one as a change from 0
            metrics.discrepancies.labels(check)

    async def run(self) -> None:
        """Reconcile for ever. A database that is away is tried again by the runtime."""
        while True:
            await self.reconcile()
            await asyncio.sleep(self._limits.interval_s)

    async def reconcile(self) -> list[Difference]:
        """One pass: a step of each walk. Nothing when another process is at it."""
        async with self._database.pool.acquire() as connection:
            # Both end with the connection's return to the pool.
            if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_ID):
                return []
            await connection.execute("SET default_transaction_isolation = 'repeatable read'")
            return [*await self._wallets(connection), *await self._holds(connection)]

    async def _wallets(self, connection: Connection) -> list[Difference]:
        after, begun = await _position(connection, "wallets")
        limits = self._limits
        step = await wallets_step(
            connection, after, begun, wallets_max=limits.wallets_max, transfers_max=limits.transfers_max
        )
        return await self._done(connection, "wallets", step)

    async def _holds(self, connection: Connection) -> list[Difference]:
        after, _ = await _position(connection, "holds")
        return await self._done(
            connection, "holds", await holds_step(connection, after, holds_max=self._limits.holds_max)
        )

    async def _done(self, connection: Connection, walk: Walk, step: Step) -> list[Difference]:
        async with connection.transaction(isolation="read_committed"):
            frozen = await _freeze(connection, step.differences)
            cycle_s = await _move(connection, walk, step)
        for what in ("wallets", "transfers", "holds"):
            self._metrics.reconciled.labels(what).inc(getattr(step, what))
        if cycle_s is not None:
            self._metrics.reconciliation_cycle.labels(walk).set(cycle_s)
        for difference in step.differences:
            self._metrics.discrepancies.labels(difference.check).inc()
            log.error(
                "discrepancy", check=difference.check, wallet_id=str(difference.wallet_id), found=difference.detail
            )
        for wallet_id in frozen:
            log.error("wallet_frozen", wallet_id=str(wallet_id), by="reconciler")
        return step.differences


async def _position(connection: Connection, walk: Walk) -> tuple[UUID | None, Begun | None]:
    row = await connection.fetchrow("SELECT after, begun FROM billing.reconciliation WHERE walk = $1", walk)
    if row is None:
        return None, None
    return row["after"], None if row["begun"] is None else _begun(orjson.loads(row["begun"]))


def _begun(stored: dict[str, Any]) -> Begun:
    moved = {UUID(account): (int(d), int(c)) for account, (d, c) in stored["moved"].items()}
    return Begun(UUID(stored["wallet_id"]), stored["seq"], stored["balance"], moved)


def _stored(begun: Begun) -> str:
    # As text: sums of a damaged ledger may be larger than JSON's readers promise to keep.
    moved = {str(account): [str(d), str(c)] for account, (d, c) in begun.moved.items()}
    return orjson.dumps({**asdict(begun), "moved": moved}, default=str).decode()


async def _freeze(connection: Connection, differences: Sequence[Difference]) -> list[UUID]:
    """Freeze the wallets that are not frozen yet, and keep why. In the writers' order of locks."""
    if not differences:
        return []
    rows = await connection.fetch(
        "SELECT id FROM billing.wallet WHERE id = ANY($1) AND frozen_at IS NULL ORDER BY id FOR UPDATE",
        list({d.wallet_id for d in differences}),
    )
    frozen = [row[0] for row in rows]
    await connection.execute("UPDATE billing.wallet SET frozen_at = clock_timestamp() WHERE id = ANY($1)", frozen)
    await connection.executemany(
        """INSERT INTO billing.discrepancy (id, wallet_id, check_name, detail, found_at)
        VALUES ($1, $2, $3, $4, clock_timestamp())""",
        [(uuid7(), d.wallet_id, d.check, d.detail) for d in differences if d.wallet_id in frozen],
    )
    return frozen


async def _move(connection: Connection, walk: Walk, step: Step) -> float | None:
    """Keep where the walk is. The seconds that the cycle took when it is over."""
    row = await connection.fetchrow(
        """INSERT INTO billing.reconciliation AS r (walk, after, begun, cycle_started_at)
        VALUES ($1, $2, $3::jsonb, clock_timestamp())
        ON CONFLICT (walk) DO UPDATE SET after = EXCLUDED.after, begun = EXCLUDED.begun,
            cycle_started_at = CASE WHEN $4 THEN EXCLUDED.cycle_started_at ELSE r.cycle_started_at END
        RETURNING extract(epoch FROM clock_timestamp() - old.cycle_started_at)""",
        walk,
        step.after,
        None if step.begun is None else _stored(step.begun),
        step.is_last,
    )
    return float(row[0]) if step.is_last and row[0] is not None else None
