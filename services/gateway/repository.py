"""The gateway's only SQL: reads of auth's two views, over a small pool that connects when first used."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import asyncpg

from services.gateway.domain import KeyRecord, SessionRecord, record_from_row
from shared.database import dsn

BY_DIGEST = """
SELECT * FROM auth.key_view WHERE digest = ANY($1::text[])
"""
SESSION_BY_ID = """
SELECT user_id, org_id, version, status, expires_at FROM auth.session_view WHERE session_id = $1::uuid
"""
POSTGRES_FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class DatabaseUnavailable(Exception):
    """PostgreSQL is down, slow, or refuses."""


class KeyRepository:
    """API keys and sessions in PostgreSQL. Every wait has a limit, and at most `connections_max` reads run at once."""

    def __init__(self, url: str, *, connections_max: int = 8, timeout_ms: int = 1_000) -> None:
        self._url = url
        self._connections_max = connections_max
        self._timeout_s = timeout_ms / 1000
        self._pool: asyncpg.Pool | None = None

    async def __aenter__(self) -> Self:
        self._pool = await asyncpg.create_pool(
            dsn(self._url),
            min_size=0,
            max_size=self._connections_max,
            timeout=self._timeout_s,
            command_timeout=self._timeout_s,
            max_inactive_connection_lifetime=300,
            server_settings={"application_name": "tollgate-gateway"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pool is not None
        self._pool.terminate()

    async def find(self, digests: list[str]) -> KeyRecord | None:
        """The key that is stored under one of the digests, whatever its status. Raises DatabaseUnavailable."""
        row = await self._fetch(BY_DIGEST, digests)
        return None if row is None else record_from_row(row)

    async def find_session(self, session_id: str) -> SessionRecord | None:
        """The session of that id, whatever its status. Raises DatabaseUnavailable."""
        row = await self._fetch(SESSION_BY_ID, session_id)
        if row is None:
            return None
        return SessionRecord(str(row["user_id"]), str(row["org_id"]), row["version"], row["status"], row["expires_at"])

    async def ping(self) -> None:
        """Raise DatabaseUnavailable unless keys can be read: for /readyz."""
        await self.find([])

    async def _fetch(self, statement: str, argument: object) -> asyncpg.Record | None:
        assert self._pool is not None
        try:
            async with asyncio.timeout(2 * self._timeout_s), self._pool.acquire(timeout=self._timeout_s) as connection:
                return await connection.fetchrow(statement, argument)
        except (OSError, TimeoutError, *POSTGRES_FAILURES) as e:
            raise DatabaseUnavailable(type(e).__name__) from e
