"""What a batch writes: one statement of many parts, each an `unnest` of columns, for any number of rows.

The parts change different tables, or different rows of one, so that their order does not matter. The columns are
unnested side by side in a select list: `FROM unnest(a, b, …)` first stores each of them as rows of one column, which
took two fifths of PostgreSQL's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from services.billing.ledger.book import Journal
from services.billing.repository.database import Connection

_COUNTERS = ("debits_posted", "credits_posted", "debits_pending", "credits_pending")
_TOKENS = ("input_tokens", "cached_input_tokens", "output_tokens")
_INSERT = "INSERT INTO billing.{table} ({columns}{extra}) SELECT {columns}{values} FROM {rows}"


class _Part:
    """One part of the statement: its name, its columns with their types, and what is done with the rows `u`."""

    def __init__(self, name: str, columns: dict[str, str], statement: str = _INSERT, **words: str) -> None:
        self.name = name
        self.columns = columns
        self._statement = statement
        self._words = {"table": name, "extra": "", "values": "", **words}

    def sql(self, first: int) -> str:
        """The part, with its parameters numbered from `first`."""
        arrays = [f"${first + n}::{kind}[]" for n, kind in enumerate(self.columns.values())]
        rows = ", ".join(f"unnest({array}) AS {name}" for array, name in zip(arrays, self.columns, strict=True))
        body = self._statement.format(
            rows=f"(SELECT {rows}) AS u", first=arrays[0], columns=", ".join(self.columns), **self._words
        )
        return f"{self.name} AS ({body})"


def _int8(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "int8")


_NOW = {"extra": ", created_at", "values": ", $1::timestamptz"}
_WHO = {"wallet_id": "uuid", "user_id": "uuid", "key_id": "uuid"}
_WALLET = {"id": "uuid", "seq_before": "int8", "seq": "int8", "updated_at": "timestamptz", "frozen": "bool"}
_PARTS = (
    _Part(
        "new_wallet",
        _WALLET,
        "INSERT INTO billing.wallet (id, seq, created_at, updated_at, frozen_at) "
        "SELECT id, seq, $1::timestamptz, updated_at, CASE WHEN frozen THEN $1::timestamptz END FROM {rows}",
    ),
    _Part(
        "wallet",
        _WALLET,
        "UPDATE billing.wallet w SET seq = u.seq, updated_at = u.updated_at, "
        "frozen_at = CASE WHEN u.frozen IS NULL THEN w.frozen_at WHEN u.frozen THEN $1::timestamptz END "
        "FROM {rows} WHERE w.id = u.id AND w.seq = u.seq_before RETURNING 1",
    ),
    _Part(
        "new_account",
        {"id": "uuid", "wallet_id": "uuid", "kind": "text", "limited": "bool", **_int8(*_COUNTERS)},
        table="account",
    ),
    _Part(
        "account",
        {"id": "uuid", **_int8(*_COUNTERS)},
        "UPDATE billing.account a SET debits_posted = u.debits_posted, credits_posted = u.credits_posted, "
        "debits_pending = u.debits_pending, credits_pending = u.credits_pending "
        "FROM {rows} WHERE a.id = u.id RETURNING 1",
    ),
    _Part(
        "credit_grant",
        {
            "account_id": "uuid",
            "wallet_id": "uuid",
            "priority": "int2",
            "effective_at": "timestamptz",
            "expires_at": "timestamptz",
            "source": "text",
            "reason": "text",
        },
    ),
    _Part(
        "expiring_grant",
        {"account_id": "uuid", "wallet_id": "uuid", "expires_at": "timestamptz"},
    ),
    _Part(
        "expired_grant",
        {"account_id": "uuid"},
        "DELETE FROM billing.expiring_grant WHERE account_id = ANY({first})",
    ),
    _Part(
        "hold",
        {
            "id": "uuid",
            **_WHO,
            "plan": "text",
            "model": "text",
            "price_id": "uuid",
            **_int8(*_TOKENS),
            "amount": "int8",
            "request_id": "text",
            "created_at": "timestamptz",
        },
    ),
    _Part("hold_slice", {"hold_id": "uuid", "position": "int4", "account_id": "uuid", "amount": "int8"}),
    _Part(
        "open_hold",
        {"hold_id": "uuid", "wallet_id": "uuid", "expires_at": "timestamptz", **_int8(*_TOKENS)},
        _INSERT + " ON CONFLICT (hold_id) DO UPDATE SET expires_at = EXCLUDED.expires_at, "
        "input_tokens = EXCLUDED.input_tokens, cached_input_tokens = EXCLUDED.cached_input_tokens, "
        "output_tokens = EXCLUDED.output_tokens",
    ),
    _Part(
        "closed_hold",
        {"hold_id": "uuid"},
        "DELETE FROM billing.open_hold WHERE hold_id = ANY({first})",
    ),
    _Part(
        "hold_resolution",
        {"hold_id": "uuid", "op_id": "uuid", "kind": "text", "amount": "int8"},
        extra=", resolved_at",
        values=", $1::timestamptz",
    ),
    _Part(
        "usage",
        {
            "hold_id": "uuid",
            "part": "int2",
            "op_id": "uuid",
            **_WHO,
            "model": "text",
            "build": "text",
            "price_id": "uuid",
            **_int8(*_TOKENS),
            "cost": "int8",
            "finish_reason": "text",
            "duration_ms": "int8",
            "request_id": "text",
        },
        **_NOW,
    ),
    _Part(
        "usage_day",
        {
            "wallet_id": "uuid",
            "day": "date",
            "model": "text",
            "key_id": "uuid",
            "user_id": "uuid",
            **_int8("requests", *_TOKENS, "cost"),
        },
        "INSERT INTO billing.usage_day AS d ({columns}) SELECT {columns} FROM {rows} "
        "ON CONFLICT (wallet_id, day, model, key_id, user_id) DO UPDATE SET requests = d.requests + EXCLUDED.requests, "
        "input_tokens = d.input_tokens + EXCLUDED.input_tokens, "
        "cached_input_tokens = d.cached_input_tokens + EXCLUDED.cached_input_tokens, "
        "output_tokens = d.output_tokens + EXCLUDED.output_tokens, cost = d.cost + EXCLUDED.cost",
    ),
    _Part(
        "transfer",
        {
            "id": "uuid",
            "op_id": "uuid",
            "wallet_id": "uuid",
            "wallet_seq": "int8",
            "debit_account": "uuid",
            "credit_account": "uuid",
            "amount": "int8",
            "code": "text",
            "hold_id": "uuid",
            "balance_after": "int8",
            "effective_at": "timestamptz",
            "booked_at": "timestamptz",
        },
    ),
    _Part(
        "op",
        {
            "tenant": "uuid",
            "idem_key": "text",
            "id": "uuid",
            "kind": "text",
            "body_sha256": "bytea",
            "refusal": "text",
            "result": "jsonb",
            "actor": "text",
        },
        **_NOW,
    ),
)


def _statement() -> str:
    parts, first = [], 2
    for part in _PARTS:
        parts.append(part.sql(first))
        first += len(part.columns)
    counts = "(SELECT count(*) FROM wallet), (SELECT count(*) FROM account)"
    return f"WITH {', '.join(parts)} SELECT $1::timestamptz, {counts}"


WRITE = _statement()

# Rare: in the statement of every batch they would cost each of them.
_EXTEND = """INSERT INTO billing.hold_extension (hold_id, number, op_id, output_tokens, amount, created_at)
    VALUES ($1, $2, $3, $4, $5, $6)"""
_AUDIT = """INSERT INTO billing.audit (wallet_id, op_id, kind, amount, frozen, reason, actor, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"""
_CHARGE = """INSERT INTO billing.charge_day AS d (wallet_id, day, key_id, user_id, amount) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (wallet_id, day, key_id, user_id) DO UPDATE SET amount = d.amount + EXCLUDED.amount"""


async def write(connection: Connection, journal: Journal) -> None:
    """Everything that the batch came to. Raises BookOutdated when a row that it changes is not as it was read."""
    rows = journal.rows
    wallets, accounts = journal.wallets(new=False), journal.counters()
    sections: tuple[Sequence[Sequence[Any]], ...] = (
        journal.wallets(new=True),
        wallets,
        journal.new_accounts(),
        accounts,
        rows.grants,
        [(g.account_id, g.wallet_id, g.expires_at) for g in rows.grants if g.expires_at is not None],
        [(account_id,) for account_id in rows.expired_grants],
        rows.holds,
        rows.slices,
        list(rows.opened.values()),
        [(hold_id,) for hold_id in rows.closed],
        rows.resolutions,
        rows.usages,
        [(*key, *sums) for key, sums in rows.rollups.items()],
        rows.transfers,
        rows.operations,
    )
    columns = (_columns(part, section) for part, section in zip(_PARTS, sections, strict=True))
    written = await connection.fetchrow(WRITE, journal.now, *chain.from_iterable(columns))
    if written[1:] != (len(wallets), len(accounts)):
        raise BookOutdated()
    if rows.extensions:
        await connection.executemany(_EXTEND, rows.extensions)
    if rows.audit:
        await connection.executemany(_AUDIT, rows.audit)
    if rows.charges:
        await connection.executemany(_CHARGE, [(*key, amount) for key, amount in rows.charges.items()])


class BookOutdated(Exception):
    """What a batch was decided on is not what the database has: nothing of it may stand."""


def _columns(part: _Part, rows: Sequence[Sequence[Any]]) -> Iterable[Sequence[Any]]:
    return zip(*rows, strict=True) if rows else ((),) * len(part.columns)
