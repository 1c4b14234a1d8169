"""What the background tasks ask: whose time is over, and how much is open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from services.billing.repository.database import Database


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all wallets; `held` in nano-credits."""

    open_holds: int
    held: int
    frozen_wallets: int


# As `leadership.shard_of`.
_SHARD_OF = "get_byte(uuid_send(wallet_id), 15) % $2 = ANY($3)"


async def expired_holds(database: Database, limit: int, shards: int, led: Sequence[int]) -> list[tuple[UUID, UUID]]:
    """(wallet, hold) of wallets in the shards that are led here, the longest expired first."""
    rows = await database.fetch(
        f"""SELECT wallet_id, hold_id FROM billing.open_hold
        WHERE expires_at <= clock_timestamp() AND {_SHARD_OF} ORDER BY expires_at LIMIT $1""",  # noqa: S608 - a constant
        limit,
        shards,
        list(led),
    )
    return [(row[0], row[1]) for row in rows]


async def expired_grants(database: Database, limit: int, shards: int, led: Sequence[int]) -> list[tuple[UUID, UUID]]:
    """(wallet, grant's account) of wallets in the shards that are led here, the longest expired first."""
    rows = await database.fetch(
        f"""SELECT wallet_id, account_id FROM billing.expiring_grant
        WHERE expires_at <= clock_timestamp() AND {_SHARD_OF} ORDER BY expires_at LIMIT $1""",  # noqa: S608 - a constant
        limit,
        shards,
        list(led),
    )
    return [(row[0], row[1]) for row in rows]


async def totals(database: Database) -> Totals:
    row = await database.fetchrow(
        """SELECT count(*), coalesce(sum(h.amount + coalesce((
                SELECT sum(amount) FROM billing.hold_extension WHERE hold_id = h.id), 0)), 0)::int8,
            (SELECT count(*) FROM billing.wallet WHERE frozen_at IS NOT NULL)
        FROM billing.open_hold o JOIN billing.hold h ON h.id = o.hold_id"""
    )
    return Totals(*row)
