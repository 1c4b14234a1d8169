"""Who leads which shard: advisory locks of sessions, an epoch for each shard, and how many processes there are.

A session's lock says who may lead; the epoch, raised by each new leader and shared by each transaction, says whose
writes count. PostgreSQL frees the lock when the session ends, however it ends.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg

from services.billing.repository.database import Connection
from shared.database import dsn

SHARD_LOCKS = 0x7011_0001
MEMBER_LOCKS = 0x7011_0002
_SETTINGS = {
    "application_name": "tollgate-billing-writer",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "lock_timeout": "5000",
    "idle_in_transaction_session_timeout": "30000",
    # A leader whose machine is gone gives its shards back after this.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    # Every statement of a writer looks up single rows by their keys, whatever the statistics of a young table say; and
    # planning a batch anew would cost more than running it.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}

_LOCKS = """FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1::int8::oid
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


class ShardsDiffer(Exception):
    """Other processes divide the wallets into another number of shards."""


def shard_of(wallet_id: UUID, shards: int) -> int:
    """By the last byte, which is random in every version of UUID that we make; `_SHARD_OF` says the same in SQL."""
    return wallet_id.int % 256 % shards


async def connect(url: str, *, timeout_s: float, statement_timeout_ms: int) -> Connection:
    """A writer's session. Its few statements stay prepared: to plan the one that writes a batch takes 8 ms."""
    settings = {**_SETTINGS, "statement_timeout": str(statement_timeout_ms)}
    return await asyncpg.connect(
        dsn(url),
        timeout=timeout_s,
        command_timeout=statement_timeout_ms / 1000 + 1,
        server_settings=settings,
        max_cached_statement_lifetime=0,
    )


async def agree_on_shards(connection: Connection, shards: int) -> None:
    """Make the shards' rows. Raises ShardsDiffer while somebody leads a shard of another division."""
    async with connection.transaction():
        await connection.execute("LOCK TABLE billing.shard IN SHARE ROW EXCLUSIVE MODE")
        present, newest = await connection.fetchrow("SELECT count(*), coalesce(max(epoch), 0) FROM billing.shard")
        if present == shards:
            return
        if await _locks(connection, SHARD_LOCKS):
            raise ShardsDiffer(f"{present} shards in use, {shards} wanted")
        await connection.execute("DELETE FROM billing.shard")
        await connection.execute(
            """INSERT INTO billing.shard (id, epoch, leader, updated_at)
            SELECT n, $2, '', clock_timestamp() FROM generate_series(0, $1 - 1) AS n""",
            shards,
            newest + 1,
        )


async def join(connection: Connection) -> None:
    """Count as one of the processes as long as the session lives."""
    await connection.execute("SELECT pg_advisory_lock_shared($1, 0)", MEMBER_LOCKS)


async def members(connection: Connection) -> int:
    """How many processes there are, this one included."""
    return max(1, await _locks(connection, MEMBER_LOCKS))


async def taken(connection: Connection) -> set[int]:
    """The shards that some session leads."""
    return {row[0] for row in await connection.fetch(f"SELECT objid::int8 {_LOCKS}", SHARD_LOCKS)}


async def try_to_lock(connection: Connection, shard: int) -> bool:
    locked: bool = await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", SHARD_LOCKS, shard)
    return locked


async def raise_epoch(connection: Connection, shard: int, shards: int, leader: str) -> int:
    """Begin to lead. Waits for the former leader's transaction. Raises ShardsDiffer."""
    epoch: int | None = await connection.fetchval(
        """UPDATE billing.shard SET epoch = epoch + 1, leader = $3, updated_at = clock_timestamp()
        WHERE id = $1 AND (SELECT count(*) FROM billing.shard) = $2 RETURNING epoch""",
        shard,
        shards,
        leader,
    )
    if epoch is None:
        raise ShardsDiffer(f"{shards} shards wanted")
    return epoch


async def leaders(database: Any) -> dict[int, str]:
    """Where the leader of each shard was last known to listen."""
    return {row[0]: row[1] for row in await database.fetch("SELECT id, leader FROM billing.shard") if row[1]}


async def _locks(connection: Connection, space: int) -> int:
    found: int = await connection.fetchval(f"SELECT count(*) {_LOCKS}", space)
    return found
