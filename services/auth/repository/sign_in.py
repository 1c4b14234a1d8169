"""What a sign-in asks of PostgreSQL, over a few connections of its own.

Beside its argon2 a sign-in should cost next to nothing, so it speaks asyncpg itself: one statement for each step, each
a transaction of its own. Everybody else has other connections: a flood of sign-ins takes none of them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self, TypeAlias

import asyncpg

from services.auth.domain import Account, AuditEntry, Session, UserStatus
from shared import ids
from shared.database import dsn

Connection: TypeAlias = asyncpg.Connection

STATEMENT_TIMEOUT_MS, LOCK_TIMEOUT_MS, IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000, 5_000, 30_000
CONNECT_TIMEOUT_S = CLOSE_TIMEOUT_S = 5.0

# The account in its first organisation that is active, as AccountRepository has it. Names are folded by PostgreSQL, as
# its indexes are: Python folds some letters otherwise.
FIND = """
    SELECT u.id, u.username, coalesce(u.email, ''), u.password_hash, u.status, u.created_at,
        o.id, o.name, m.role, o.plan,
        ARRAY(SELECT r.role FROM auth.user_role r WHERE r.user_id = u.id ORDER BY r.role),
        ARRAY(
            SELECT DISTINCT p.scope FROM auth.role_permission p
            JOIN auth.user_role r ON r.role = p.role WHERE r.user_id = u.id ORDER BY p.scope
        )
    FROM auth.user_account u
    JOIN auth.membership m ON m.user_id = u.id
    JOIN auth.organization o ON o.id = m.org_id
    WHERE u.kind = 'person' AND o.status = 'active'
        AND (lower(u.username) = lower($1::text) OR lower(u.email) = lower($1::text))
    ORDER BY m.created_at, m.org_id
    LIMIT 1
"""
_CONFIRM = """
    SELECT id FROM auth.user_account
    WHERE id = $1 AND password_hash = $2 AND $3::text IS NULL AND status = 'active' FOR SHARE
"""
_RENEW = """
    UPDATE auth.user_account SET password_hash = $3::text, updated_at = $6
    WHERE id = $1 AND password_hash = $2 AND status = 'active' RETURNING id
"""
# A password that was changed while it was looked at opens nothing, and is not written back.
_OPEN = """
    WITH confirmed AS ({confirmed}),
    opened AS (
        INSERT INTO auth.session
            (id, user_id, org_id, created_at, last_used_at, expires_at, user_agent, address, browser)
        SELECT $4::uuid, id, $5::uuid, $6::timestamptz, $6, $7::timestamptz, $8::text, $9::inet, $10::boolean
        FROM confirmed RETURNING id
    ),
    issued AS (
        INSERT INTO auth.refresh_token (digest, session_id, created_at, expires_at)
        SELECT $11::text, id, $6::timestamptz, $12::timestamptz FROM opened RETURNING session_id
    )
    SELECT (
        SELECT count(*) FROM auth.session s WHERE s.user_id = $1 AND s.revoked_at IS NULL AND s.expires_at > $6
    ) FROM issued
"""
_OPEN_CONFIRMED, _OPEN_RENEWED = _OPEN.format(confirmed=_CONFIRM), _OPEN.format(confirmed=_RENEW)
_AUDIT = """
    INSERT INTO auth.audit_log
        (id, at, action, actor_user_id, actor_key_id, org_id, target_type, target_id, request_id, address, details)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::inet, $11::jsonb)
"""


class SignInDatabase:
    """At most `connections_max` at once; who waits longer than `wait_s` for one gets a TimeoutError."""

    def __init__(self, url: str, *, connections_max: int, wait_s: float) -> None:
        self._wait_s = wait_s
        self._pool = asyncpg.create_pool(
            dsn(url),
            min_size=0,
            max_size=connections_max,
            max_inactive_connection_lifetime=300,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=STATEMENT_TIMEOUT_MS / 1000 + 1,
            reset=_reset,
            server_settings={
                "application_name": "tollgate-auth-sign-in",
                "statement_timeout": str(STATEMENT_TIMEOUT_MS),
                "lock_timeout": str(LOCK_TIMEOUT_MS),
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
                "timezone": "UTC",
            },
        )

    async def __aenter__(self) -> Self:
        await self._pool
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with self._pool.acquire(timeout=self._wait_s) as connection:
            yield connection

    async def find(self, login: str) -> Account | None:
        """The account of a user name or an e-mail address, in the user's first organisation that is active."""
        async with self.connection() as connection:
            row = await connection.fetchrow(FIND, login)
        return _account(row) if row else None

    async def open(
        self, account: Account, new_hash: str | None, session: Session, digest: str, expires_at: datetime
    ) -> int | None:
        """Begin a session with a refresh token, and renew the account's hash if a new one is given.

        How many live sessions the account had besides; None, and nothing was done, where its password or its status
        is not what it was when it was read.
        """
        async with self.connection() as connection:
            others: int | None = await connection.fetchval(
                _OPEN_RENEWED if new_hash else _OPEN_CONFIRMED,
                account.user_id,
                account.password_hash,
                new_hash,
                session.id,
                session.org_id,
                session.created_at,
                session.expires_at,
                session.user_agent,
                ip_address(session.address) if session.address else None,
                session.browser,
                digest,
                expires_at,
            )
        return others

    async def record(self, entry: AuditEntry, at: datetime) -> None:
        """A line of the audit log, as audit.append writes it."""
        async with self.connection() as connection:
            await connection.execute(
                _AUDIT,
                ids.uuid7(),
                at,
                entry.action,
                entry.actor_user_id,
                entry.actor_key_id,
                entry.org_id,
                entry.target_type,
                entry.target_id,
                entry.origin.request_id,
                ip_address(entry.origin.address) if entry.origin.address else None,
                json.dumps(dict(entry.details)),
            )


async def _reset(connection: Connection) -> None:
    """Before the next one has it: only what was broken off leaves anything to undo."""
    if connection.is_in_transaction():
        await connection.reset()


def _account(row: Any) -> Account:
    user_id, username, email, password_hash, status, created_at, org_id, org_name, org_role, plan, roles, scopes = row
    return Account(
        user_id=user_id,
        username=username,
        email=email,
        password_hash=password_hash,
        status=UserStatus(status),
        created_at=created_at,
        org_id=org_id,
        org_name=org_name,
        org_role=org_role,
        plan=plan,
        roles=tuple(roles),
        scopes=tuple(scopes),
    )
