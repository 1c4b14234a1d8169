"""The ledger's SQL: lock a wallet, load its book, write what the kernel decided. Every call is inside a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from services.billing.domain import Price, PriceTerms, Usage
from services.billing.ledger.book import (
    Account,
    Book,
    Grant,
    HoldRow,
    HoldState,
    OpenHold,
    Resolution,
    Slice,
    Transfer,
    UsageRow,
)
from services.billing.repository.database import Connection
from shared.ids import uuid7


@dataclass(frozen=True, slots=True)
class Locked:
    """A wallet's row, locked until the end of the transaction."""

    seq: int
    is_frozen: bool
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Remembered:
    """An operation that was applied or refused before. `result` is JSON."""

    kind: str
    body_sha256: bytes
    refusal: str | None
    result: str


async def lock_wallet(connection: Connection, wallet_id: UUID) -> Locked | None:
    """Wait for the wallet's row and lock it; None when there is no such wallet."""
    row = await connection.fetchrow(
        "SELECT seq, frozen_at IS NOT NULL, updated_at FROM billing.wallet WHERE id = $1 FOR UPDATE", wallet_id
    )
    return Locked(*row) if row else None


async def insert_wallet(connection: Connection, wallet_id: UUID) -> bool:
    """Make the wallet's row; False when another transaction did, which has committed by then."""
    status: str = await connection.execute(
        """INSERT INTO billing.wallet (id, seq, created_at, updated_at)
        SELECT $1, 0, now, now FROM clock_timestamp() AS now ON CONFLICT DO NOTHING""",
        wallet_id,
    )
    return status.endswith(" 1")


async def clock(connection: Connection) -> datetime:
    """The database's clock at this statement, not at the beginning of the transaction: that may have waited."""
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return now


async def find_operation(connection: Connection, tenant: UUID, keys: Sequence[str]) -> Remembered | None:
    row = await connection.fetchrow(
        """SELECT kind, body_sha256, refusal, result::text FROM billing.op
        WHERE tenant = $1 AND idem_key = ANY($2) ORDER BY created_at LIMIT 1""",
        tenant,
        list(keys),
    )
    return Remembered(*row) if row else None


async def load_accounts(connection: Connection, book: Book) -> None:
    """The wallet's system accounts, and its grants that have anything left."""
    rows = await connection.fetch(
        """SELECT a.id, a.kind, a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending,
            g.priority, g.effective_at, g.expires_at, g.source
        FROM billing.account a LEFT JOIN billing.credit_grant g ON g.account_id = a.id
        WHERE a.wallet_id = $1 AND (a.kind <> 'grant' OR a.credits_posted > a.debits_posted)""",
        book.wallet_id,
    )
    for row in rows:
        account = Account(*row[:6])
        if account.kind == "grant":
            book.grants[account.id] = Grant(account, *row[6:10])
        else:
            book.accounts[account.kind] = account


async def load_hold(connection: Connection, book: Book, hold_id: UUID) -> None:
    """One hold with its state; the id of another wallet's hold goes to `foreign_holds`."""
    row = await connection.fetchrow(
        """SELECT h.wallet_id, h.user_id, h.key_id, h.plan, h.model, h.price_id,
            h.input_tokens, h.cached_input_tokens, h.output_tokens, h.amount, h.request_id, h.created_at,
            t.customer_class, p.per_request, p.input AS p_input, p.cached_input AS p_cached, p.output AS p_output,
            lower(p.validity) AS valid_from,
            o.expires_at, o.input_tokens AS o_input, o.cached_input_tokens AS o_cached, o.output_tokens AS o_output,
            r.op_id AS resolved_by, r.kind AS resolution, r.amount AS resolved_amount, r.resolved_at,
            u.input_tokens AS u_input, u.cached_input_tokens AS u_cached, u.output_tokens AS u_output, u.cost AS u_cost
        FROM billing.hold h
        JOIN billing.price p ON p.id = h.price_id JOIN billing.tariff t ON t.id = p.tariff_id
        LEFT JOIN billing.open_hold o ON o.hold_id = h.id
        LEFT JOIN billing.hold_resolution r ON r.hold_id = h.id
        LEFT JOIN billing.usage u ON u.hold_id = h.id AND u.part = 0
        WHERE h.id = $1""",
        hold_id,
    )
    if row is None:
        return
    if row["wallet_id"] != book.wallet_id:
        book.foreign_holds.add(hold_id)
        return
    slices = await connection.fetch(
        "SELECT account_id, amount FROM billing.hold_slice WHERE hold_id = $1 ORDER BY position", hold_id
    )
    book.holds[hold_id] = _hold_state(hold_id, row, tuple(Slice(*s) for s in slices))


def _hold_state(hold_id: UUID, row: Any, slices: tuple[Slice, ...]) -> HoldState:
    terms = PriceTerms(row["per_request"], row["p_input"], row["p_cached"], row["p_output"])
    hold = HoldRow(
        id=hold_id,
        wallet_id=row["wallet_id"],
        user_id=row["user_id"],
        key_id=row["key_id"],
        plan=row["plan"],
        model=row["model"],
        price=Price(row["price_id"], row["model"], row["customer_class"], terms, row["valid_from"]),
        covered=Usage(row["input_tokens"], row["cached_input_tokens"], row["output_tokens"]),
        amount=row["amount"],
        request_id=row["request_id"],
        created_at=row["created_at"],
        slices=slices,
    )
    state = HoldState(hold)
    if row["expires_at"] is not None:
        state.open = OpenHold(row["expires_at"], Usage(row["o_input"], row["o_cached"], row["o_output"]))
    if row["resolution"] is not None:
        state.resolution = Resolution(
            hold_id, row["resolved_by"], row["resolution"], row["resolved_amount"], row["resolved_at"]
        )
    if row["u_cost"] is not None:
        state.posted = Usage(row["u_input"], row["u_cached"], row["u_output"])
        state.posted_cost = row["u_cost"]
    return state


async def load_prices(connection: Connection, book: Book, model: str, classes: Sequence[str]) -> None:
    """The versions in force at the book's time."""
    rows = await connection.fetch(
        """SELECT p.id, t.model, t.customer_class, p.per_request, p.input, p.cached_input, p.output,
            lower(p.validity), upper(p.validity)
        FROM billing.tariff t JOIN billing.price p ON p.tariff_id = t.id
        WHERE t.model = $1 AND t.customer_class = ANY($2) AND p.validity @> $3::timestamptz""",
        model,
        list(classes),
        book.now,
    )
    for row in rows:
        book.prices[row[1], row[2]] = Price(row[0], row[1], row[2], PriceTerms(*row[3:7]), row[7], row[8])


async def insert_operation(
    connection: Connection,
    *,
    tenant: UUID,
    key: str,
    op_id: UUID,
    kind: str,
    body_sha256: bytes,
    refusal: str | None,
    result: str,
    actor: str,
    at: datetime,
) -> None:
    """Remember it. Raises UniqueViolationError when another transaction was first."""
    await connection.execute(
        """INSERT INTO billing.op (tenant, idem_key, id, kind, body_sha256, refusal, result, actor, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9)""",
        tenant,
        key,
        op_id,
        kind,
        body_sha256,
        refusal,
        result,
        actor,
        at,
    )


async def claim_operation(
    connection: Connection, tenant: UUID, key: str, kind: str, body_sha256: bytes, result: str, actor: str
) -> bool:
    """Remember an operation whose result is known beforehand; False when the key is taken, after waiting for that."""
    status: str = await connection.execute(
        """INSERT INTO billing.op (tenant, idem_key, id, kind, body_sha256, result, actor, created_at)
        VALUES ($1, $2, $3, $4, $5, $6::jsonb, $7, clock_timestamp()) ON CONFLICT DO NOTHING""",
        tenant,
        key,
        uuid7(),
        kind,
        body_sha256,
        result,
        actor,
    )
    return status.endswith(" 1")


async def write(connection: Connection, book: Book) -> None:
    """Everything that the book's operations came to, but for the memory of the operations."""
    rows = book.rows
    await _insert_accounts(connection, book, rows.accounts)
    await _insert_grants(connection, book.wallet_id, rows.grants)
    new = {account.id for account in rows.accounts}
    await _update_counters(connection, [a for a in book.touched.values() if a.id not in new])
    await _insert_holds(connection, rows.holds)
    await _write_open_holds(connection, book)
    await _many(
        connection,
        """INSERT INTO billing.hold_resolution (hold_id, op_id, kind, amount, resolved_at)
        VALUES ($1, $2, $3, $4, $5)""",
        [(r.hold_id, r.op_id, r.kind, r.amount, r.at) for r in rows.resolutions],
    )
    await _insert_usage(connection, rows.usages)
    await _insert_transfers(connection, book.wallet_id, rows.transfers)
    await _many(
        connection,
        "DELETE FROM billing.expiring_grant WHERE account_id = $1",
        [(account_id,) for account_id in rows.expired_grants],
    )
    await connection.execute(
        "UPDATE billing.wallet SET seq = $2, updated_at = $3 WHERE id = $1", book.wallet_id, book.seq, book.booked_at
    )


async def _insert_accounts(connection: Connection, book: Book, accounts: Iterable[Account]) -> None:
    await _many(
        connection,
        """INSERT INTO billing.account
            (id, wallet_id, kind, limited, debits_posted, credits_posted, debits_pending, credits_pending)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)""",
        [(a.id, book.wallet_id, a.kind, a.limited, *_counters(a)) for a in accounts],
    )


async def _insert_grants(connection: Connection, wallet_id: UUID, grants: Sequence[Grant]) -> None:
    await _many(
        connection,
        """INSERT INTO billing.credit_grant
            (account_id, wallet_id, priority, effective_at, expires_at, source, reason)
        VALUES ($1, $2, $3, $4, $5, $6, $7)""",
        [(g.account.id, wallet_id, g.priority, g.effective_at, g.expires_at, g.source, g.reason) for g in grants],
    )
    await _many(
        connection,
        "INSERT INTO billing.expiring_grant (account_id, wallet_id, expires_at) VALUES ($1, $2, $3)",
        [(g.account.id, wallet_id, g.expires_at) for g in grants if g.expires_at is not None],
    )


async def _update_counters(connection: Connection, accounts: Iterable[Account]) -> None:
    await _many(
        connection,
        """UPDATE billing.account
        SET debits_posted = $2, credits_posted = $3, debits_pending = $4, credits_pending = $5 WHERE id = $1""",
        [(a.id, *_counters(a)) for a in accounts],
    )


async def _insert_holds(connection: Connection, holds: Sequence[HoldRow]) -> None:
    await _many(
        connection,
        """INSERT INTO billing.hold (id, wallet_id, user_id, key_id, plan, model, price_id,
            input_tokens, cached_input_tokens, output_tokens, amount, request_id, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)""",
        [
            (
                h.id,
                h.wallet_id,
                h.user_id,
                h.key_id,
                h.plan,
                h.model,
                h.price.id,
                *_tokens(h.covered),
                h.amount,
                h.request_id,
                h.created_at,
            )
            for h in holds
        ],
    )
    await _many(
        connection,
        "INSERT INTO billing.hold_slice (hold_id, position, account_id, amount) VALUES ($1, $2, $3, $4)",
        [(h.id, position, s.account_id, s.amount) for h in holds for position, s in enumerate(h.slices)],
    )


async def _write_open_holds(connection: Connection, book: Book) -> None:
    await _many(
        connection,
        """INSERT INTO billing.open_hold AS o
            (hold_id, wallet_id, expires_at, input_tokens, cached_input_tokens, output_tokens)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (hold_id) DO UPDATE SET expires_at = EXCLUDED.expires_at,
            input_tokens = EXCLUDED.input_tokens, cached_input_tokens = EXCLUDED.cached_input_tokens,
            output_tokens = EXCLUDED.output_tokens""",
        [(hold_id, book.wallet_id, o.expires_at, *_tokens(o.usage)) for hold_id, o in book.rows.opened.items()],
    )
    await _many(
        connection, "DELETE FROM billing.open_hold WHERE hold_id = $1", [(hold_id,) for hold_id in book.rows.closed]
    )


async def _insert_usage(connection: Connection, usages: Sequence[UsageRow]) -> None:
    await _many(
        connection,
        """INSERT INTO billing.usage (hold_id, part, op_id, wallet_id, user_id, key_id, model, build, price_id,
            input_tokens, cached_input_tokens, output_tokens, cost, finish_reason, duration_ms, request_id, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)""",
        [
            (
                u.hold.id,
                u.part,
                u.op_id,
                u.hold.wallet_id,
                u.hold.user_id,
                u.hold.key_id,
                u.hold.model,
                u.build,
                u.hold.price.id,
                *u.tokens,
                u.cost,
                u.finish_reason,
                u.duration_ms,
                u.hold.request_id,
                u.at,
            )
            for u in usages
        ],
    )


async def _insert_transfers(connection: Connection, wallet_id: UUID, transfers: Sequence[Transfer]) -> None:
    await _many(
        connection,
        """INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account,
            amount, code, hold_id, balance_after, effective_at, booked_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)""",
        [
            (
                uuid7(),
                t.op_id,
                wallet_id,
                t.seq,
                t.debit_account,
                t.credit_account,
                t.amount,
                t.code,
                t.hold_id,
                t.balance_after,
                t.effective_at,
                t.booked_at,
            )
            for t in transfers
        ],
    )


async def _many(connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """One round trip for all rows, and none when there is none."""
    if len(rows) == 1:
        await connection.execute(statement, *rows[0])
    elif rows:
        await connection.executemany(statement, rows)


def _counters(account: Account) -> tuple[int, int, int, int]:
    return account.debits_posted, account.credits_posted, account.debits_pending, account.credits_pending


def _tokens(usage: Usage) -> tuple[int, int, int]:
    return usage.input_tokens, usage.cached_input_tokens, usage.output_tokens
