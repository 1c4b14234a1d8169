"""Top-ups: what was ordered, where it is paid, and what came of it.

A top-up is paid when the ledger has a grant of its id: to credit it and to mark it is the same row. The status that is
stored follows, so that what is settled is not looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.billing.repository.database import Connection, Database


@dataclass(frozen=True, slots=True)
class TopUpRow:
    """`amount` in nano-credits, `money_minor` in the smallest unit of the currency."""

    id: UUID
    wallet_id: UUID
    provider: str
    provider_ref: str
    amount: int
    currency: str
    money_minor: int
    status: str
    failure: str | None
    session_id: str | None
    checkout_url: str | None
    requested_by: str
    created_at: datetime
    updated_at: datetime


_COLUMNS = """id, wallet_id, provider, provider_ref, amount, currency, money_minor,
    CASE WHEN EXISTS (SELECT FROM billing.credit_grant g WHERE g.account_id = topup.id) THEN 'paid' ELSE status END,
    failure, session_id, checkout_url, requested_by, created_at, updated_at"""


async def insert(connection: Connection, topup: TopUpRow) -> None:
    """A pending one. Raises UniqueViolationError for a provider's reference that another one has."""
    await connection.execute(
        """INSERT INTO billing.topup (id, wallet_id, provider, provider_ref, amount, currency, money_minor, status,
            requested_by, created_at, updated_at, checked_at)
        SELECT $1, $2, $3, $4, $5, $6, $7, 'pending', $8, now, now, now FROM clock_timestamp() AS now""",
        topup.id,
        topup.wallet_id,
        topup.provider,
        topup.provider_ref,
        topup.amount,
        topup.currency,
        topup.money_minor,
        topup.requested_by,
    )


async def find(database: Database, topup_id: UUID) -> TopUpRow | None:
    row = await database.fetchrow(
        f"SELECT {_COLUMNS} FROM billing.topup WHERE id = $1",  # noqa: S608 - a constant
        topup_id,
    )
    return TopUpRow(*row) if row else None


async def reference_is_taken(connection: Connection, provider: str, provider_ref: str) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM billing.topup WHERE provider = $1 AND provider_ref = $2)",
            provider,
            provider_ref,
        )
    )


async def page(database: Database, org_id: UUID, before: UUID | None, limit: int) -> list[TopUpRow]:
    """Newest first."""
    rows = await database.fetch(
        f"""SELECT {_COLUMNS} FROM billing.topup WHERE wallet_id = $1 AND ($2::uuid IS NULL OR id < $2)
        ORDER BY id DESC LIMIT $3""",  # noqa: S608 - a constant
        org_id,
        before,
        limit,
    )
    return [TopUpRow(*row) for row in rows]


async def keep_session(database: Database, topup_id: UUID, session_id: str, url: str | None) -> None:
    """Where it is paid; the first one told stays."""
    await database.fetchrow(
        """UPDATE billing.topup SET session_id = $2, checkout_url = $3, updated_at = clock_timestamp()
        WHERE id = $1 AND session_id IS NULL RETURNING id""",
        topup_id,
        session_id,
        url,
    )


async def mark_paid(database: Database, topup_id: UUID) -> None:
    """Let the stored status follow the grant."""
    await database.fetchrow(
        """UPDATE billing.topup SET status = 'paid', grant_account_id = id, failure = NULL,
            updated_at = clock_timestamp()
        WHERE id = $1 AND status <> 'paid' RETURNING id""",
        topup_id,
    )


async def mark_failed(database: Database, topup_id: UUID, failure: str) -> None:
    """Of a pending one; paid stays paid."""
    await database.fetchrow(
        """UPDATE billing.topup SET status = 'failed', failure = $2, updated_at = clock_timestamp()
        WHERE id = $1 AND status = 'pending' RETURNING id""",
        topup_id,
        failure,
    )


async def lease_unsettled(database: Database, unchecked_s: float, limit: int) -> list[TopUpRow]:
    """Pending ones that nobody has asked about for a while: longer for older ones. They count as asked about now."""
    rows = await database.fetch(
        f"""UPDATE billing.topup SET checked_at = clock_timestamp() WHERE id IN (
            SELECT id FROM billing.topup
            WHERE status = 'pending'
                AND checked_at < clock_timestamp() - greatest(
                    make_interval(secs => $1), (clock_timestamp() - created_at) / 10)
            ORDER BY checked_at LIMIT $2 FOR UPDATE SKIP LOCKED)
        RETURNING {_COLUMNS}""",  # noqa: S608 - a constant
        unchecked_s,
        limit,
    )
    return [TopUpRow(*row) for row in rows]


async def freezes(database: Database, org_id: UUID) -> set[tuple[str, str]]:
    """Who has frozen the wallet since it was last released, and why; a discrepancy of its books counts as one."""
    rows = await database.fetch(
        """SELECT actor, reason FROM billing.audit a WHERE wallet_id = $1 AND kind = 'freeze' AND frozen
            AND NOT EXISTS (SELECT FROM billing.audit r
                WHERE r.wallet_id = $1 AND r.kind = 'freeze' AND NOT r.frozen AND r.op_id > a.op_id)
        UNION SELECT 'reconciler', check_name FROM billing.discrepancy WHERE wallet_id = $1""",
        org_id,
    )
    return {(row[0], row[1]) for row in rows}
