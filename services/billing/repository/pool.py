"""The pool of connections to PostgreSQL. The ledger speaks asyncpg itself: what it writes are arrays, not objects."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from shared.database import dsn


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Every wait for PostgreSQL."""

    connections_max: int = 16
    connect_timeout_s: float = 5.0
    acquire_timeout_s: float = 5.0
    statement_timeout_ms: int = 10_000
    lock_timeout_ms: int = 5_000
    idle_in_transaction_timeout_ms: int = 30_000


def create_pool(url: str, limits: PoolLimits) -> asyncpg.Pool:
    """A pool that connects when it is first used, so that the service starts before its database. Await it to open."""
    return asyncpg.create_pool(
        dsn(url),
        min_size=0,
        max_size=limits.connections_max,
        max_inactive_connection_lifetime=300,
        timeout=limits.connect_timeout_s,
        command_timeout=limits.statement_timeout_ms / 1000 + 1,
        server_settings={
            "application_name": "tollgate-billing",
            "statement_timeout": str(limits.statement_timeout_ms),
            "lock_timeout": str(limits.lock_timeout_ms),
            "idle_in_transaction_session_timeout": str(limits.idle_in_transaction_timeout_ms),
            "synchronous_commit": "on",
            "timezone": "UTC",
        },
    )


async def ping(pool: asyncpg.Pool) -> None:
    """Raise unless the schema answers: for /readyz."""
    await pool.fetchval("SELECT 1 FROM billing.wallet LIMIT 1")
