"""Wallets and their history in bulk, as the ledger would have written them: `python -m bench.ledger.books URL …`.

Rows go in by `INSERT … SELECT` without triggers, which takes a superuser; afterwards `verify` finds no difference. A
settled request is a hold with a slice, a resolution, a usage, two operations, a transfer, and a part of its day's
sums.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from uuid import UUID

import asyncpg

from shared.database import dsn

GRANT_NANO = 10**15
HELD_TOKENS, USED_TOKENS = 300, 250
WALLETS_PER_STATEMENT = 20_000
REQUESTS_PER_STATEMENT = 50_000

WALLETS = """
    WITH w AS (SELECT uuidv7() AS id, uuidv7() AS grant_id, uuidv7() AS funding_id, uuidv7() AS op_id, now() AS at
        FROM generate_series(1, $1::int)),
    wallets AS (INSERT INTO billing.wallet (id, seq, created_at, updated_at) SELECT id, 1, at, at FROM w),
    accounts AS (
        INSERT INTO billing.account
            (id, wallet_id, kind, limited, debits_posted, credits_posted, debits_pending, credits_pending)
        SELECT grant_id, id, 'grant', true, 0, $2::int8, 0, 0 FROM w
        UNION ALL SELECT funding_id, id, 'funding', false, $2, 0, 0, 0 FROM w
        UNION ALL SELECT uuidv7(), id, kind, false, 0, 0, 0, 0
            FROM w CROSS JOIN unnest(ARRAY['revenue', 'receivable', 'breakage']) AS kind),
    grants AS (
        INSERT INTO billing.credit_grant (account_id, wallet_id, priority, effective_at, source, reason)
        SELECT grant_id, id, 100, at, 'manual', 'bench' FROM w),
    operations AS (
        INSERT INTO billing.op (tenant, idem_key, id, kind, body_sha256, result, actor, created_at)
        SELECT id, 'grant:' || grant_id, op_id, 'grant', sha256(''), '{}', 'bench', at FROM w),
    transfers AS (
        INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount, code,
            balance_after, effective_at, booked_at)
        SELECT uuidv7(), op_id, id, 1, funding_id, grant_id, $2, 'grant', $2, at, at FROM w)
    SELECT id FROM w"""

# $1 wallets, $2 requests of each, $3 model, $4 tokens held, $5 tokens used; a token costs one nano-credit.
REQUESTS = """
    WITH w AS (
        SELECT w.id, w.seq, g.id AS grant_id, g.credits_posted - g.debits_posted AS balance, r.id AS revenue_id
        FROM billing.wallet w JOIN billing.account g ON g.wallet_id = w.id AND g.kind = 'grant'
            JOIN billing.account r ON r.wallet_id = w.id AND r.kind = 'revenue'
        WHERE w.id = ANY($1::uuid[])),
    p AS (
        SELECT p.id FROM billing.price p JOIN billing.tariff t ON t.id = p.tariff_id
        WHERE t.model = $3::text AND t.customer_class = 'default' AND upper_inf(p.validity)),
    q AS MATERIALIZED (
        SELECT w.*, n, p.id AS price_id, uuidv7() AS hold_id, uuidv7() AS hold_op, uuidv7() AS settle_op, now() AS at
        FROM w CROSS JOIN p CROSS JOIN generate_series(1, $2::int) AS n),
    holds AS (
        INSERT INTO billing.hold (id, wallet_id, plan, model, price_id, input_tokens, cached_input_tokens,
            output_tokens, amount, request_id, created_at)
        SELECT hold_id, id, 'default', $3, price_id, 0, 0, $4::int8, $4, 'req_bench', at FROM q),
    slices AS (
        INSERT INTO billing.hold_slice (hold_id, position, account_id, amount) SELECT hold_id, 0, grant_id, $4 FROM q),
    resolutions AS (
        INSERT INTO billing.hold_resolution (hold_id, op_id, kind, amount, resolved_at)
        SELECT hold_id, settle_op, 'post', $5::int8, at FROM q),
    usages AS (
        INSERT INTO billing.usage (hold_id, part, op_id, wallet_id, model, build, price_id, input_tokens,
            cached_input_tokens, output_tokens, cost, finish_reason, duration_ms, request_id, created_at)
        SELECT hold_id, 0, settle_op, id, $3, 'bench', price_id, 0, 0, $5, $5, 'stop', 5, 'req_bench', at FROM q),
    operations AS (
        INSERT INTO billing.op (tenant, idem_key, id, kind, body_sha256, result, actor, created_at)
        SELECT id, 'hold:' || hold_id, hold_op, 'hold', sha256(''), jsonb_build_object('amount', $4), 'bench', at FROM q
        UNION ALL
        SELECT id, 'settle:' || hold_id, settle_op, 'settle', sha256(''), jsonb_build_object('settled', $5), 'bench', at
        FROM q),
    transfers AS (
        INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount, code,
            hold_id, balance_after, effective_at, booked_at)
        SELECT uuidv7(), settle_op, id, seq + n, grant_id, revenue_id, $5, 'usage', hold_id, balance - $5 * n, at, at
        FROM q ORDER BY hold_id),
    days AS (
        INSERT INTO billing.usage_day AS d (wallet_id, day, model, requests, input_tokens, cached_input_tokens,
            output_tokens, cost)
        SELECT id, (now() AT TIME ZONE 'UTC')::date, $3, $2, 0, 0, $2 * $5, $2 * $5 FROM w
        ON CONFLICT ON CONSTRAINT uq_usage_day_wallet_id_day_model_key_id_user_id DO UPDATE
        SET requests = d.requests + EXCLUDED.requests, output_tokens = d.output_tokens + EXCLUDED.output_tokens,
            cost = d.cost + EXCLUDED.cost),
    wallets AS (
        UPDATE billing.wallet b SET seq = b.seq + $2, updated_at = now() FROM w WHERE b.id = w.id),
    accounts AS (
        UPDATE billing.account a
        SET debits_posted = a.debits_posted + CASE a.kind WHEN 'grant' THEN $2 * $5 ELSE 0 END,
            credits_posted = a.credits_posted + CASE a.kind WHEN 'revenue' THEN $2 * $5 ELSE 0 END
        FROM w WHERE a.id IN (w.grant_id, w.revenue_id))
    SELECT count(*) FROM q"""


async def add_wallets(url: str, count: int) -> list[UUID]:
    """So many new wallets with one large grant each."""
    connection = await _bulk(url)
    try:
        wallets: list[UUID] = []
        while len(wallets) < count:
            size = min(WALLETS_PER_STATEMENT, count - len(wallets))
            wallets += [row[0] for row in await connection.fetch(WALLETS, size, GRANT_NANO)]
        return wallets
    finally:
        await connection.close()


async def add_requests(
    url: str, wallets: list[UUID], count: int, model: str, on_progress: Callable[[int], None] = lambda _: None
) -> None:
    """About `count` settled requests, the same number for each wallet, at least one."""
    each = max(1, count // len(wallets))
    chunk = max(1, REQUESTS_PER_STATEMENT // each)
    connection = await _bulk(url)
    try:
        done = 0
        for begin in range(0, len(wallets), chunk):
            part = wallets[begin : begin + chunk]
            for _ in range(-(-each // REQUESTS_PER_STATEMENT)):
                size = min(each, REQUESTS_PER_STATEMENT)
                done += await connection.fetchval(REQUESTS, part, size, model, HELD_TOKENS, USED_TOKENS)
                on_progress(done)
                if done >= count:
                    return
    finally:
        await connection.close()


async def _bulk(url: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn(url), command_timeout=None)
    await connection.execute("SET session_replication_role = 'replica'")  # no triggers: no foreign keys either
    await connection.execute("SET synchronous_commit = off")
    return connection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a migrated database, as a superuser")
    parser.add_argument("--wallets", type=int, default=1_000)
    parser.add_argument("--transfers", type=int, default=10_000_000)
    parser.add_argument("--model", default="chat-mini", help="one that has a price for everybody")
    arguments = parser.parse_args()
    began_s = said_s = time.monotonic()

    def progress(done: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s > 2:
            said_s = time.monotonic()
            print(f"{done:,} transfers, {done / (said_s - began_s):,.0f}/s", flush=True)

    async def load() -> None:
        wallets = await add_wallets(arguments.url, arguments.wallets)
        await add_requests(arguments.url, wallets, arguments.transfers, arguments.model, progress)

    asyncio.run(load())
    print(f"done in {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
