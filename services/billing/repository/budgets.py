"""Budgets as they are set; the ledger reads them with its own query when it holds."""

from __future__ import annotations

from uuid import UUID

from services.billing.domain import Budget
from services.billing.repository.database import Connection, Database


async def budgets(database: Database, org_id: UUID) -> list[Budget]:
    """Keys before members, each by id."""
    rows = await database.fetch(
        """WITH today AS (SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date AS today),
        budgets AS (
            SELECT subject, subject_id, max(amount) FILTER (WHERE period = 'day') AS day,
                max(amount) FILTER (WHERE period = 'month') AS month
            FROM billing.budget WHERE wallet_id = $1 GROUP BY subject, subject_id)
        SELECT b.subject, b.subject_id, b.day, b.month, coalesce(s.day, 0)::int8, coalesce(s.month, 0)::int8
        FROM budgets b CROSS JOIN today t CROSS JOIN LATERAL (
            SELECT sum(u.cost) FILTER (WHERE u.day = t.today) AS day, sum(u.cost) AS month
            FROM (SELECT wallet_id, key_id, user_id, day, cost FROM billing.usage_day
                UNION ALL SELECT wallet_id, key_id, user_id, day, amount FROM billing.charge_day) u
            WHERE u.wallet_id = $1 AND u.day BETWEEN date_trunc('month', t.today)::date AND t.today
                AND b.subject_id = CASE b.subject WHEN 'key' THEN u.key_id ELSE u.user_id END) s
        ORDER BY b.subject, b.subject_id""",
        org_id,
    )
    return [Budget(*row) for row in rows]


async def count(connection: Connection, org_id: UUID) -> int:
    """How many limits the wallet has."""
    found: int = await connection.fetchval("SELECT count(*) FROM billing.budget WHERE wallet_id = $1", org_id)
    return found


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
