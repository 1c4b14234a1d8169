"""Invoices: computed from a wallet's transfers, stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import date, datetime
from uuid import UUID

from services.billing.repository.database import Connection, Database

STATEMENT_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """`amount` is what moved, `effect` what that did to the balance, in nano-credits.

    `usage` lines are of one model at one price version: their `amount` is the cost, paid or owed. The others are sums
    of a kind of transfer, grants by their source.
    """

    kind: str
    source: str | None
    model: str | None
    price_id: UUID | None
    count: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    amount: int
    effect: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """The transfers numbered from `after_seq` (not included) to `until_seq`. `total` is what was used."""

    id: UUID
    wallet_id: UUID
    month: date
    after_seq: int
    until_seq: int
    opening: int
    closing: int
    total: int
    issued_at: datetime | None


_INVOICE = "id, wallet_id, month, after_seq, until_seq, opening, closing, total, issued_at"
_LINE = ", ".join(field.name for field in fields(InvoiceLine))

_LINES = """
    WITH moved AS (
        SELECT t.op_id, t.hold_id, t.code, t.amount, t.credit_account,
            CASE WHEN c.limited THEN t.amount ELSE 0 END - CASE WHEN d.limited THEN t.amount ELSE 0 END AS effect
        FROM billing.transfer t
        JOIN billing.account c ON c.id = t.credit_account JOIN billing.account d ON d.id = t.debit_account
        WHERE t.wallet_id = $1 AND t.wallet_seq > $2 AND t.wallet_seq <= $3),
    requests AS (
        SELECT op_id, hold_id, sum(amount) AS amount, sum(effect) AS effect
        FROM moved WHERE code IN ('usage', 'late', 'receivable') GROUP BY op_id, hold_id)
    SELECT 'usage' AS kind, NULL AS source, h.model, h.price_id, count(DISTINCT r.hold_id),
        coalesce(sum(u.input_tokens), 0)::int8, coalesce(sum(u.cached_input_tokens), 0)::int8,
        coalesce(sum(u.output_tokens), 0)::int8, sum(r.amount)::int8, sum(r.effect)::int8
    FROM requests r JOIN billing.hold h ON h.id = r.hold_id
    LEFT JOIN billing.usage u ON u.hold_id = r.hold_id AND u.op_id = r.op_id
    GROUP BY h.model, h.price_id
    UNION ALL
    SELECT m.code, g.source, NULL, NULL, count(*), 0, 0, 0, sum(m.amount)::int8, sum(m.effect)::int8
    FROM moved m LEFT JOIN billing.credit_grant g ON g.account_id = m.credit_account AND m.code = 'grant'
    WHERE m.code NOT IN ('usage', 'late', 'receivable') GROUP BY m.code, g.source
    ORDER BY 1, 2, 3, 4"""

BALANCE_AT_SEQ = "SELECT balance_after FROM billing.transfer WHERE wallet_id = $1 AND wallet_seq = $2"


async def lines(connection: Connection, org_id: UUID, after: int, until: int) -> list[InvoiceLine]:
    """Everything that a range of transfers came to. For long months: its time limit is its own."""
    await connection.execute(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_S}s'")
    rows = await connection.fetch(_LINES, org_id, after, until, timeout=STATEMENT_TIMEOUT_S + 1)
    return [InvoiceLine(*row) for row in rows]


async def balance_at_seq(connection: Connection, org_id: UUID, seq: int) -> int:
    """After the transfer of this number; 0 before the first."""
    return int(await connection.fetchval(BALANCE_AT_SEQ, org_id, seq) or 0)


async def wait_for_writers(connection: Connection, org_id: UUID) -> datetime | None:
    """Wait until whoever writes to the wallet now has committed; when it was opened, None for no wallet."""
    opened: datetime | None = await connection.fetchval(
        "SELECT created_at FROM billing.wallet WHERE id = $1 FOR UPDATE", org_id
    )
    return opened


async def newest(database: Database, org_id: UUID) -> Invoice | None:
    """The last one issued."""
    row = await database.fetchrow(
        f"SELECT {_INVOICE} FROM billing.invoice WHERE wallet_id = $1 ORDER BY month DESC LIMIT 1",  # noqa: S608
        org_id,
    )
    return Invoice(*row) if row else None


async def page(database: Database, org_id: UUID, before: date | None, limit: int) -> list[Invoice]:
    """Newest first."""
    rows = await database.fetch(
        f"""SELECT {_INVOICE} FROM billing.invoice WHERE wallet_id = $1 AND ($2::date IS NULL OR month < $2)
        ORDER BY month DESC LIMIT $3""",  # noqa: S608 - a constant
        org_id,
        before,
        limit,
    )
    return [Invoice(*row) for row in rows]


async def find(database: Database, org_id: UUID, month: date) -> tuple[Invoice, list[InvoiceLine]] | None:
    row = await database.fetchrow(
        f"SELECT {_INVOICE} FROM billing.invoice WHERE wallet_id = $1 AND month = $2",  # noqa: S608 - a constant
        org_id,
        month,
    )
    if row is None:
        return None
    rows = await database.fetch(
        f"SELECT {_LINE} FROM billing.invoice_line WHERE invoice_id = $1 ORDER BY position",  # noqa: S608 - a constant
        row[0],
    )
    return Invoice(*row), [InvoiceLine(*line) for line in rows]


async def insert(connection: Connection, invoice: Invoice, found: Sequence[InvoiceLine]) -> None:
    """Nothing when another process has issued it."""
    issued = await connection.fetchval(
        """INSERT INTO billing.invoice (id, wallet_id, month, after_seq, until_seq, opening, closing, total, issued_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp()) ON CONFLICT DO NOTHING RETURNING id""",
        *astuple(invoice)[:-1],
    )
    if issued is None:
        return
    await connection.executemany(
        f"""INSERT INTO billing.invoice_line (invoice_id, position, {_LINE})
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)""",  # noqa: S608 - a constant
        [(invoice.id, position, *astuple(line)) for position, line in enumerate(found)],
    )
