"""Balances that customers want to hear of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from services.billing.repository.database import Connection, Database


@dataclass(frozen=True, slots=True)
class Changed:
    """A threshold whose wallet has moved since it was last looked at."""

    wallet_id: UUID
    amount: int
    is_below: bool
    seq: int
    balance: int


async def thresholds(database: Database, org_id: UUID) -> list[tuple[int, bool]]:
    """(amount, whether the balance is below it), the largest first."""
    rows = await database.fetch(
        "SELECT amount, is_below FROM billing.balance_threshold WHERE wallet_id = $1 ORDER BY amount DESC", org_id
    )
    return [(row[0], row[1]) for row in rows]


async def replace(connection: Connection, org_id: UUID, amounts: Sequence[int]) -> None:
    """Exactly these; one that was there already has told what it had to tell."""
    await connection.execute(
        "DELETE FROM billing.balance_threshold WHERE wallet_id = $1 AND amount <> ALL($2)", org_id, list(amounts)
    )
    await connection.execute(
        """INSERT INTO billing.balance_threshold (wallet_id, amount, is_below, seen_seq)
        SELECT $1, amount, false, -1 FROM unnest($2::int8[]) AS amount ON CONFLICT DO NOTHING""",
        org_id,
        list(amounts),
    )


async def lock_changed(connection: Connection, limit: int) -> list[Changed]:
    """Locked until the end of the transaction; what others have locked is left to them."""
    rows = await connection.fetch(
        """SELECT b.wallet_id, b.amount, b.is_below, w.seq, coalesce((
            SELECT t.balance_after FROM billing.transfer t WHERE t.wallet_id = w.id AND t.wallet_seq = w.seq), 0)
        FROM billing.balance_threshold b JOIN billing.wallet w ON w.id = b.wallet_id
        WHERE b.seen_seq <> w.seq LIMIT $1 FOR UPDATE OF b SKIP LOCKED""",
        limit,
    )
    return [Changed(*row) for row in rows]


async def see(connection: Connection, changed: Changed, *, is_below: bool) -> None:
    """Remember how it stood, and after which transfer."""
    await connection.execute(
        "UPDATE billing.balance_threshold SET is_below = $3, seen_seq = $4 WHERE wallet_id = $1 AND amount = $2",
        changed.wallet_id,
        changed.amount,
        is_below,
        changed.seq,
    )
