"""PostgreSQL as billing uses it: one pool, and every piece of work tried again when the connection, or the server,
gave up in the middle.

The ledger speaks asyncpg itself: what it writes are arrays, not objects. Work must be safe to repeat: reads are, and a
transaction that writes looks first whether it was done before, since the acknowledgement of a COMMIT may get lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import asyncpg

from services.billing.errors import LedgerUnavailable
from shared.database import dsn
from shared.telemetry import get_logger

log = get_logger(__name__)

Connection: TypeAlias = asyncpg.Connection
T = TypeVar("T")

TRANSIENT: tuple[type[BaseException], ...] = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.UniqueViolationError,  # another transaction was first with this key; the next look finds it
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,  # connections, memory, disk
    asyncpg.ReadOnlySQLTransactionError,  # a standby, before or after a failover
    asyncpg.InvalidCachedStatementError,  # a migration has changed a table; the next attempt prepares anew
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the driver's word for a connection that broke at an awkward moment
    TimeoutError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class DatabaseLimits:
    """Every wait for PostgreSQL, and how often work is tried."""

    connections_max: int = 16
    connect_timeout_s: float = 5.0
    acquire_timeout_s: float = 5.0
    statement_timeout_ms: int = 10_000
    lock_timeout_ms: int = 5_000
    idle_in_transaction_timeout_ms: int = 30_000
    close_timeout_s: float = 10.0
    attempts_max: int = 5
    backoff_first_s: float = 0.02
    backoff_max_s: float = 0.5


class Database:
    """A pool that connects when it is first used, so that the service starts before its database."""

    def __init__(self, url: str, limits: DatabaseLimits | None = None) -> None:
        self._limits = limits or DatabaseLimits()
        self.pool = asyncpg.create_pool(
            dsn(url),
            min_size=0,
            max_size=self._limits.connections_max,
            max_inactive_connection_lifetime=300,
            timeout=self._limits.connect_timeout_s,
            command_timeout=self._limits.statement_timeout_ms / 1000 + 1,
            server_settings={
                "application_name": "tollgate-billing",
                "statement_timeout": str(self._limits.statement_timeout_ms),
                "lock_timeout": str(self._limits.lock_timeout_ms),
                "idle_in_transaction_session_timeout": str(self._limits.idle_in_transaction_timeout_ms),
                "synchronous_commit": "on",
                "timezone": "UTC",
            },
        )

    async def __aenter__(self) -> Database:
        await self.pool
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.wait_for(self.pool.close(), self._limits.close_timeout_s)
        except TimeoutError:
            self.pool.terminate()

    async def transaction(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do the work in a transaction; its result is durable when this returns. Raises LedgerUnavailable."""

        async def attempt() -> T:
            acquired = self.pool.acquire(timeout=self._limits.acquire_timeout_s)
            async with acquired as connection, connection.transaction():
                return await work(connection)

        return await self._repeated(attempt)

    async def fetch(self, query: str, *arguments: object) -> list[Any]:
        """All rows of a read. Raises LedgerUnavailable."""
        return await self._repeated(lambda: self.pool.fetch(query, *arguments))

    async def fetchrow(self, query: str, *arguments: object) -> Any:
        """The first row of a read, or None. Raises LedgerUnavailable."""
        return await self._repeated(lambda: self.pool.fetchrow(query, *arguments))

    async def ping(self) -> None:
        """Raise unless the schema answers: for /readyz."""
        await self.pool.fetchval("SELECT 1 FROM billing.wallet LIMIT 1")

    async def _repeated(self, attempt: Callable[[], Awaitable[T]]) -> T:
        limits = self._limits
        for number in range(1, limits.attempts_max + 1):
            try:
                return await attempt()
            except TRANSIENT as e:
                log.warning("database_interrupted", attempt=number, cause=type(e).__name__)
                if number == limits.attempts_max:
                    raise LedgerUnavailable(detail=type(e).__name__, retry_after_s=1) from e
            ceiling_s = min(limits.backoff_max_s, limits.backoff_first_s * 2**number)
            await asyncio.sleep(random.uniform(ceiling_s / 2, ceiling_s))  # noqa: S311 - spreads retries
        raise AssertionError("attempts_max is at least 1")
