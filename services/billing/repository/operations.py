"""The memory of what was asked under a client's key, for everything that the ledger's writer does not do itself."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from services.billing.repository.database import Connection
from shared.ids import uuid7


@dataclass(frozen=True, slots=True)
class Remembered:
    """What was asked, as a hash, and what came of it, as JSON."""

    body_sha256: bytes
    result: str


async def lock_key(connection: Connection, tenant: UUID, key: str) -> None:
    """Wait for whoever works under the same key, until the end of the transaction."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{tenant}:{key}")


async def find(connection: Connection, tenant: UUID, key: str) -> Remembered | None:
    row = await connection.fetchrow(
        "SELECT body_sha256, result::text FROM billing.op WHERE tenant = $1 AND idem_key = $2", tenant, key
    )
    return Remembered(*row) if row else None


async def insert(
    connection: Connection, tenant: UUID, key: str, kind: str, body_sha256: bytes, result: str, actor: str
) -> None:
    """Remember it. Raises UniqueViolationError when the ledger was first with this key."""
    await connection.execute(
        """INSERT INTO billing.op (tenant, idem_key, id, kind, body_sha256, result, actor, created_at)
        VALUES ($1, $2, $3, $4, $5, $6::jsonb, $7, clock_timestamp())""",
        tenant,
        key,
        uuid7(),
        kind,
        body_sha256,
        result,
        actor,
    )
