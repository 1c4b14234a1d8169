"""The ledger's SQL: what a batch reads first, and what it loads of wallets that are not in memory.

Every call is inside a transaction. What a batch writes is in services/billing/repository/ledger_write.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from uuid import UUID

from services.billing.domain import Price, PriceTerms, Usage
from services.billing.ledger.book import Account, Book, Draw, Grant, Hold, Slice
from services.billing.ledger.rows import HoldRow
from services.billing.ledger.spending import Spending
from services.billing.repository.database import Connection

# Locked first, so that whoever locks the table knows that no writer holds anything else and waits for it.
BEGIN = "BEGIN; LOCK TABLE billing.wallet IN ROW SHARE MODE"

_READ = """
    WITH fence AS MATERIALIZED (SELECT epoch FROM billing.shard WHERE id = $1 FOR SHARE)
    SELECT (SELECT epoch FROM fence), clock_timestamp(), (SELECT generation FROM billing.price_generation),
        known.versions, known.seqs,
        (SELECT json_agg(json_build_array(k.n - 1, o.kind, encode(o.body_sha256, 'hex'), o.refusal, o.result::text))
            FROM unnest($3::uuid[], $4::text[]) WITH ORDINALITY AS k (tenant, idem_key, n)
            JOIN billing.op o ON o.tenant = k.tenant AND o.idem_key = k.idem_key)
    FROM (SELECT array_agg(w.version ORDER BY k.n) AS versions, array_agg(w.seq ORDER BY k.n) AS seqs
        FROM unnest($2::uuid[]) WITH ORDINALITY AS k (id, n) LEFT JOIN billing.wallet w ON w.id = k.id) known"""

_WALLETS = """
    SELECT w.id, w.seq, w.version, w.frozen_at IS NOT NULL, w.updated_at,
        EXISTS (SELECT FROM billing.credit_grant g WHERE g.wallet_id = w.id AND g.source = 'signup'),
        EXISTS (SELECT FROM billing.budget b WHERE b.wallet_id = w.id)
    FROM billing.wallet w WHERE w.id = ANY($1)"""

# The system's accounts, and the grants that have anything left.
_ACCOUNTS = """
    SELECT a.wallet_id, a.id, a.kind, a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending,
        g.priority, g.expires_at
    FROM billing.account a LEFT JOIN billing.credit_grant g ON g.account_id = a.id
    WHERE a.wallet_id = ANY($1) AND (a.kind <> 'grant' OR a.credits_posted > a.debits_posted)"""

_GRANTS = """
    SELECT a.wallet_id, a.id, a.kind, a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending,
        g.priority, g.expires_at
    FROM billing.account a JOIN billing.credit_grant g ON g.account_id = a.id
    WHERE a.id = ANY($1) AND a.wallet_id = $2"""

_BUDGETS = """
    SELECT wallet_id, subject, subject_id, array_agg(period), array_agg(amount)
    FROM billing.budget WHERE wallet_id = ANY($1) GROUP BY 1, 2, 3"""

# Sums of every key and member at once: one sum for each budget would read the month's rows as often as there are some.
_SPENT = """
    SELECT wallet_id, key_id, user_id, coalesce(sum(cost) FILTER (WHERE day = $2::date), 0)::int8, sum(cost)::int8
    FROM (SELECT wallet_id, key_id, user_id, day, cost FROM billing.usage_day
        UNION ALL SELECT wallet_id, key_id, user_id, day, amount FROM billing.charge_day) spent
    WHERE wallet_id = ANY($1) AND day BETWEEN date_trunc('month', $2::date)::date AND $2::date GROUP BY 1, 2, 3"""

_HELD = """
    SELECT o.wallet_id, h.key_id, h.user_id, sum(h.amount + coalesce((
        SELECT sum(amount) FROM billing.hold_extension WHERE hold_id = h.id), 0))::int8
    FROM billing.open_hold o JOIN billing.hold h ON h.id = o.hold_id WHERE o.wallet_id = ANY($1) GROUP BY 1, 2, 3"""

_HOLDS = """
    SELECT h.id, h.wallet_id, h.user_id, h.key_id, h.plan, h.model, h.price_id,
        h.input_tokens, h.cached_input_tokens, h.output_tokens, h.amount, h.request_id, h.created_at,
        p.per_request, p.input AS p_input, p.cached_input AS p_cached, p.output AS p_output,
        s.accounts, s.amounts,
        o.expires_at, o.input_tokens AS o_input, o.cached_input_tokens AS o_cached, o.output_tokens AS o_output,
        r.kind AS resolution,
        u.input_tokens AS u_input, u.cached_input_tokens AS u_cached, u.output_tokens AS u_output, u.cost AS u_cost,
        e.amount AS extended_by, e.output_tokens AS extended_to
    FROM billing.hold h
    JOIN billing.price p ON p.id = h.price_id
    CROSS JOIN LATERAL (SELECT array_agg(account_id ORDER BY position) AS accounts,
            array_agg(amount ORDER BY position) AS amounts FROM billing.hold_slice WHERE hold_id = h.id) s
    CROSS JOIN LATERAL (SELECT coalesce(sum(amount), 0)::int8 AS amount,
            coalesce(max(output_tokens), 0) AS output_tokens FROM billing.hold_extension WHERE hold_id = h.id) e
    LEFT JOIN billing.open_hold o ON o.hold_id = h.id
    LEFT JOIN billing.hold_resolution r ON r.hold_id = h.id
    LEFT JOIN billing.usage u ON u.hold_id = h.id AND u.part = 0
    WHERE h.id = ANY($1)"""

_DRAWS = """
    SELECT CASE code WHEN 'refund' THEN credit_account ELSE debit_account END, amount, code
    FROM billing.transfer WHERE wallet_id = $1 AND hold_id = $2 ORDER BY wallet_seq"""

_PRICE = """
    SELECT p.id, t.model, t.customer_class, p.per_request, p.input, p.cached_input, p.output,
        lower(p.validity), upper(p.validity)
    FROM {} JOIN billing.price p ON p.tariff_id = t.id
    WHERE (upper_inf(p.validity) OR upper(p.validity) > clock_timestamp())"""

_PRICES = _PRICE.format("""unnest($1::text[], $2::text[]) AS k (model, customer_class)
    JOIN billing.tariff t ON t.model = k.model AND t.customer_class = k.customer_class""")

_EVERY_PRICE = _PRICE.format("billing.tariff t") + " LIMIT $1"


@dataclass(frozen=True, slots=True)
class Remembered:
    """An operation that was applied or refused before. `result` is JSON."""

    kind: str
    body_sha256: bytes
    refusal: str | None
    result: str


@dataclass(frozen=True, slots=True)
class FirstLook:
    """What a batch reads before all else.

    `versions` are (version, seq) in the order of the wallets, None for no wallet; `remembered` is by the index of the
    key that was asked for; `now` is the database's clock.
    """

    epoch: int | None
    now: datetime
    price_generation: int
    versions: list[tuple[int, int] | None]
    remembered: dict[int, Remembered]


async def first_look(
    connection: Connection, shard: int, wallets: Sequence[UUID], keys: Sequence[tuple[UUID, str]]
) -> FirstLook:
    """Share the shard's epoch until the end of the transaction; look up operations, and what wallets are at."""
    tenants, names = [key[0] for key in keys], [key[1] for key in keys]
    row = await connection.fetchrow(_READ, shard, wallets, tenants, names)
    epoch, now, generation, versions, seqs, found = row
    return FirstLook(
        epoch,
        now,
        generation,
        [None if v is None else (v, s) for v, s in zip(versions or (), seqs or (), strict=True)],
        {
            n: Remembered(kind, bytes.fromhex(digest), refusal, result)
            for n, kind, digest, refusal, result in _json(found)
        },
    )


def _json(text: str | None) -> list[Any]:
    found: list[Any] = json.loads(text) if text else []
    return found


async def load_books(connection: Connection, wallets: Sequence[UUID], now: datetime) -> dict[UUID, Book]:
    """The books of these wallets, without their holds; what is not there is not in the answer."""
    books, budgeted = {}, []
    for wallet_id, seq, version, frozen, updated_at, has_signup, has_budgets in await connection.fetch(
        _WALLETS, wallets
    ):
        books[wallet_id] = Book(
            wallet_id, seq, version, frozen, updated_at, has_signup=has_signup, seq_written=seq, frozen_written=frozen
        )
        if has_budgets:
            budgeted.append(wallet_id)
    for row in await connection.fetch(_ACCOUNTS, list(books)):
        book, account = books[row[0]], Account(*row[1:7])
        if account.kind == "grant":
            book.know(Grant(account, row[7], row[8]))
        else:
            book.accounts[account.kind] = account
    if budgeted:
        await _load_spending(connection, books, budgeted, now.date())
    return books


async def _load_spending(connection: Connection, books: dict[UUID, Book], wallets: Sequence[UUID], today: date) -> None:
    for wallet_id, subject, subject_id, periods, limits in await connection.fetch(_BUDGETS, wallets):
        books[wallet_id].spending[subject, subject_id] = Spending(dict(zip(periods, limits, strict=True)), today)
    for wallet_id, key_id, user_id, day, month in await connection.fetch(_SPENT, wallets, today):
        for spending in books[wallet_id].spendings(key_id, user_id):
            spending.day += day
            spending.month += month
    for wallet_id, key_id, user_id, held in await connection.fetch(_HELD, wallets):
        for spending in books[wallet_id].spendings(key_id, user_id):
            spending.held += held


async def load_holds(connection: Connection, hold_ids: Sequence[UUID]) -> list[Hold]:
    """These holds with their present state, of whatever wallet."""
    return [_hold(row) for row in await connection.fetch(_HOLDS, hold_ids)]


def _hold(row: Any) -> Hold:
    slices = zip(row["accounts"] or (), row["amounts"] or (), strict=True)
    hold = Hold(
        row=HoldRow(*row[:13]),
        terms=PriceTerms(row["per_request"], row["p_input"], row["p_cached"], row["p_output"]),
        slices=tuple(Slice(account_id, amount) for account_id, amount in slices),
        expires_at=row["expires_at"] or row["created_at"],
        resolution=row["resolution"],
        extended_by=row["extended_by"],
        extended_to=row["extended_to"],
    )
    if row["expires_at"] is not None:
        hold.usage = Usage(row["o_input"], row["o_cached"], row["o_output"])
    if row["u_cost"] is not None:
        hold.posted = Usage(row["u_input"], row["u_cached"], row["u_output"])
        hold.posted_cost = row["u_cost"]
    return hold


async def load_draws(connection: Connection, book: Book, source_id: UUID) -> None:
    """What a hold or a charge took, and what of it was given back; with the grants, spent ones too."""
    draws = [Draw(*row) for row in await connection.fetch(_DRAWS, book.wallet_id, source_id)]
    book.draws[source_id] = draws
    missing = {draw.account_id for draw in draws} - book.grants.keys()
    for row in await connection.fetch(_GRANTS, list(missing), book.wallet_id) if missing else ():
        book.know(Grant(Account(*row[1:7]), row[7], row[8]))


async def load_prices(connection: Connection, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[Price]]:
    """The versions of (model, customer class) that are in force now or later; an empty list where there is none."""
    prices: dict[tuple[str, str], list[Price]] = {pair: [] for pair in wanted}
    models, classes = [pair[0] for pair in prices], [pair[1] for pair in prices]
    for row in await connection.fetch(_PRICES, models, classes):
        prices[row[1], row[2]].append(_price(row))
    return prices


async def load_every_price(connection: Connection, count_max: int) -> dict[tuple[str, str], list[Price]] | None:
    """All versions that are in force now or later; None if they are more than that."""
    rows = await connection.fetch(_EVERY_PRICE, count_max + 1)
    if len(rows) > count_max:
        return None
    prices: dict[tuple[str, str], list[Price]] = {}
    for row in rows:
        prices.setdefault((row[1], row[2]), []).append(_price(row))
    return prices


def _price(row: Any) -> Price:
    return Price(row[0], row[1], row[2], PriceTerms(*row[3:7]), row[7], row[8])
