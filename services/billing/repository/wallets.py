"""Wallets as people look at them: balances of the past, and grants."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.billing.repository.database import Database


@dataclass(frozen=True, slots=True)
class BalanceAt:
    """What was left at a time, in nano-credits; `seq` is the number of the last transfer until then, 0 for none."""

    at: datetime
    seq: int
    balance: int


@dataclass(frozen=True, slots=True)
class GrantView:
    """A grant and what is left of it, in nano-credits; `held` is a part of `left`."""

    id: UUID
    source: str
    reason: str
    priority: int
    amount: int
    left: int
    held: int
    effective_at: datetime
    expires_at: datetime | None


# Transfers of a wallet are numbered without a gap, in the order of their times: how many lie before a time is found by
# halving, with one look at the index for each step. No index on the time, which every transfer would have to pay for.
# $1 the wallet, $2 the time, which is not included.
SEQ_BEFORE = """
    WITH RECURSIVE bisect (low, high) AS (
        SELECT 0::int8, seq FROM billing.wallet WHERE id = $1
        UNION ALL
        SELECT CASE WHEN t.booked_at < $2 THEN m.middle ELSE m.low END,
            CASE WHEN t.booked_at < $2 THEN m.high ELSE m.middle - 1 END
        FROM (SELECT low, high, (low + high + 1) / 2 AS middle FROM bisect WHERE low < high) m
        CROSS JOIN LATERAL (
            SELECT booked_at FROM billing.transfer WHERE wallet_id = $1 AND wallet_seq = m.middle
        ) t
    )
    SELECT low FROM bisect WHERE low = high"""


async def seq_before(database: Database, org_id: UUID, at: datetime) -> int:
    """The number of the last transfer that was booked before a time; 0 for none."""
    row = await database.fetchrow(SEQ_BEFORE, org_id, at)
    return int(row[0]) if row else 0


async def balance_at(database: Database, org_id: UUID, at: datetime | None) -> BalanceAt | None:
    """The balance after everything booked at or before a time, now if none is given. None for a time in the future."""
    row = await database.fetchrow(
        f"""WITH moment AS (SELECT coalesce($2::timestamptz, now) AS at, now FROM clock_timestamp() AS now),
        last AS ({SEQ_BEFORE.replace("$2", "((SELECT at FROM moment) + interval '1 microsecond')")})
        SELECT m.at, coalesce((SELECT low FROM last), 0), coalesce((
            SELECT balance_after FROM billing.transfer WHERE wallet_id = $1 AND wallet_seq = (SELECT low FROM last)
        ), 0) FROM moment m WHERE m.at <= m.now""",  # noqa: S608 - a constant
        org_id,
        at,
    )
    return BalanceAt(*row) if row else None


async def grants(database: Database, org_id: UUID, *, all_of_them: bool, limit: int) -> list[GrantView]:
    """In the order in which they are drawn."""
    rows = await database.fetch(
        """SELECT g.account_id, g.source, g.reason, g.priority, a.credits_posted, a.credits_posted - a.debits_posted,
            a.debits_pending, g.effective_at, g.expires_at
        FROM billing.credit_grant g JOIN billing.account a ON a.id = g.account_id
        WHERE g.wallet_id = $1 AND ($2 OR a.credits_posted > a.debits_posted)
        ORDER BY g.priority, g.expires_at NULLS LAST, g.account_id LIMIT $3""",
        org_id,
        all_of_them,
        limit,
    )
    return [GrantView(*row) for row in rows]
