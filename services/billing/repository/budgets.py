"""Budgets as they are set; the ledger reads them with its own query when it holds."""

from __future__ import annotations

from uuid import UUID

from services.billing.domain import Budget
from services.billing.repository.database import Connection, Database


async def budgets(database: Database, org_id: UUID) -> list[Budget]:
    """Keys before members, each by id."""
    rows = await database.fetch(
        """SELECT subject, subject_id, max(amount) FILTER (WHERE period = 'day'),
            max(amount) FILTER (WHERE period = 'month')
        FROM billing.budget WHERE wallet_id = $1 GROUP BY subject, subject_id ORDER BY subject, subject_id""",
        org_id,
    )
    return [Budget(*row) for row in rows]


async def put(
    connection: Connection, org_id: UUID, subject: str, subject_id: UUID, period: str, amount: int | None
) -> None:
    """Set one limit, or remove it."""
    if amount is None:
        await connection.execute(
            """DELETE FROM billing.budget
            WHERE wallet_id = $1 AND subject = $2 AND subject_id = $3 AND period = $4""",
            org_id,
            subject,
            subject_id,
            period,
        )
        return
    await connection.execute(
        """INSERT INTO billing.budget (wallet_id, subject, subject_id, period, amount, updated_at)
        VALUES ($1, $2, $3, $4, $5, clock_timestamp())
        ON CONFLICT (wallet_id, subject, subject_id, period)
        DO UPDATE SET amount = EXCLUDED.amount, updated_at = EXCLUDED.updated_at""",
        org_id,
        subject,
        subject_id,
        period,
        amount,
    )
