"""`verify`: recompute everything that is stored twice, from one snapshot, and list what differs.

The sums are computed by PostgreSQL and not by the kernel, costs included: this is a second implementation of the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import asyncpg

from shared.database import dsn
from shared.money import format_credits

SAMPLES_MAX = 20
STATEMENT_TIMEOUT_MS = 30 * 60 * 1000

# Each query answers with (wallet, what differs) for every difference.
CHECKS: dict[str, str] = {
    "transfers are numbered without a gap": """
        SELECT w.id, format('wallet says %s, there are %s transfers, the last is %s', w.seq, t.n, t.last)
        FROM billing.wallet w CROSS JOIN LATERAL (
            SELECT count(*) n, count(DISTINCT wallet_seq) numbers, coalesce(max(wallet_seq), 0) last
            FROM billing.transfer WHERE wallet_id = w.id) t
        WHERE w.seq <> t.n OR t.numbers <> t.n OR t.last <> t.n""",
    "accounts equal their transfers": """
        WITH moved AS (
            SELECT account, sum(debit) debits, sum(credit) credits FROM (
                SELECT debit_account account, amount debit, 0 credit FROM billing.transfer
                UNION ALL SELECT credit_account, 0, amount FROM billing.transfer) legs GROUP BY account)
        SELECT a.wallet_id, format('account %s (%s): %s debited and %s credited, but the counters say %s and %s',
            a.id, a.kind, coalesce(m.debits, 0), coalesce(m.credits, 0), a.debits_posted, a.credits_posted)
        FROM billing.account a LEFT JOIN moved m ON m.account = a.id
        WHERE a.debits_posted <> coalesce(m.debits, 0) OR a.credits_posted <> coalesce(m.credits, 0)""",
    "debits equal credits": """
        SELECT wallet_id, format('posted %s and %s, pending %s and %s', sum(debits_posted), sum(credits_posted),
            sum(debits_pending), sum(credits_pending))
        FROM billing.account GROUP BY wallet_id
        HAVING sum(debits_posted) <> sum(credits_posted) OR sum(debits_pending) <> sum(credits_pending)""",
    "what is pending equals the slices of open holds": """
        WITH slices AS (
            SELECT s.account_id, sum(s.amount) amount
            FROM billing.open_hold o JOIN billing.hold_slice s ON s.hold_id = o.hold_id GROUP BY s.account_id)
        SELECT a.wallet_id, format('account %s (%s): %s pending, open slices are %s',
            a.id, a.kind, a.debits_pending, coalesce(s.amount, 0))
        FROM billing.account a LEFT JOIN slices s ON s.account_id = a.id
        WHERE a.debits_pending <> coalesce(s.amount, 0) OR (a.kind <> 'revenue' AND a.credits_pending <> 0)""",
    "transfers stay within their wallet": """
        SELECT t.wallet_id, format('transfer %s', t.id)
        FROM billing.transfer t JOIN billing.account d ON d.id = t.debit_account
            JOIN billing.account c ON c.id = t.credit_account
        WHERE d.wallet_id <> t.wallet_id OR c.wallet_id <> t.wallet_id""",
    "balances follow from the transfers": """
        SELECT wallet_id, format('transfer %s: balance_after is %s, replayed %s', id, balance_after, replayed) FROM (
            SELECT t.id, t.wallet_id, t.balance_after,
                sum(CASE WHEN c.limited THEN t.amount ELSE 0 END - CASE WHEN d.limited THEN t.amount ELSE 0 END)
                    OVER (PARTITION BY t.wallet_id ORDER BY t.wallet_seq) replayed
            FROM billing.transfer t JOIN billing.account d ON d.id = t.debit_account
                JOIN billing.account c ON c.id = t.credit_account) r
        WHERE balance_after <> replayed""",
    "transfers belong to operations that were applied": """
        SELECT t.wallet_id, format('transfer %s', t.id)
        FROM billing.transfer t
        WHERE NOT EXISTS (SELECT FROM billing.op o WHERE o.id = t.op_id AND o.refusal IS NULL)""",
    "holds are covered by their slices": """
        SELECT h.wallet_id, format('hold %s: %s, slices are %s', h.id, h.amount, s.amount)
        FROM billing.hold h CROSS JOIN LATERAL (
            SELECT coalesce(sum(amount), 0) amount FROM billing.hold_slice WHERE hold_id = h.id) s
        WHERE h.amount <> s.amount""",
    "holds cost what their price says": """
        SELECT h.wallet_id, format('hold %s: %s', h.id, h.amount)
        FROM billing.hold h JOIN billing.price p ON p.id = h.price_id
        WHERE h.amount <> p.per_request + ceil((
            (h.input_tokens - h.cached_input_tokens)::numeric * p.input
            + h.cached_input_tokens::numeric * p.cached_input + h.output_tokens::numeric * p.output) / 1000000)""",
    "holds are open or resolved": """
        SELECT h.wallet_id, format('hold %s', h.id)
        FROM billing.hold h LEFT JOIN billing.open_hold o ON o.hold_id = h.id
            LEFT JOIN billing.hold_resolution r ON r.hold_id = h.id
        WHERE (o.hold_id IS NULL) = (r.hold_id IS NULL)""",
    "usage costs what its price says": """
        WITH running AS (
            SELECT u.*, sum(u.cost) OVER parts total, sum(u.input_tokens) OVER parts all_input,
                sum(u.cached_input_tokens) OVER parts all_cached, sum(u.output_tokens) OVER parts all_output
            FROM billing.usage u WINDOW parts AS (PARTITION BY u.hold_id ORDER BY u.part))
        SELECT r.wallet_id, format('hold %s part %s: %s', r.hold_id, r.part, r.cost)
        FROM running r JOIN billing.price p ON p.id = r.price_id
        WHERE r.total <> greatest(r.total - r.cost, p.per_request + ceil((
            (r.all_input - r.all_cached) * p.input
            + r.all_cached * p.cached_input + r.all_output * p.output) / 1000000))""",
    "usage is paid or owed": """
        WITH paid AS (
            SELECT hold_id, sum(amount) amount FROM billing.transfer
            WHERE code IN ('usage', 'late', 'receivable') GROUP BY hold_id),
        used AS (SELECT hold_id, sum(cost) cost FROM billing.usage GROUP BY hold_id)
        SELECT h.wallet_id, format('hold %s: used %s, taken %s', h.id, coalesce(u.cost, 0), coalesce(p.amount, 0))
        FROM billing.hold h LEFT JOIN used u ON u.hold_id = h.id LEFT JOIN paid p ON p.hold_id = h.id
        WHERE coalesce(u.cost, 0) <> coalesce(p.amount, 0)""",
    "resolutions say what was taken": """
        SELECT h.wallet_id, format('hold %s: %s', h.id, r.amount)
        FROM billing.hold_resolution r JOIN billing.hold h ON h.id = r.hold_id
        WHERE r.amount <> (SELECT coalesce(sum(amount), 0) FROM billing.transfer t
            WHERE t.op_id = r.op_id AND t.wallet_id = h.wallet_id AND t.code = 'usage' AND t.hold_id = h.id)""",
    "who owes has nothing available": """
        SELECT w.wallet_id, format('owes %s', w.debits_posted - w.credits_posted)
        FROM billing.account w
        WHERE w.kind = 'receivable' AND w.debits_posted > w.credits_posted AND EXISTS (
            SELECT FROM billing.account a JOIN billing.credit_grant g ON g.account_id = a.id
            WHERE a.wallet_id = w.wallet_id AND a.credits_posted > a.debits_posted + a.debits_pending
                AND (g.expires_at IS NULL OR g.expires_at > clock_timestamp()))""",
}

_TOTALS = """
    SELECT (SELECT count(*) FROM billing.wallet), (SELECT count(*) FROM billing.transfer),
        (SELECT count(*) FROM billing.hold), (SELECT count(*) FROM billing.open_hold),
        coalesce(sum(debits_posted) FILTER (WHERE kind = 'funding'), 0),
        coalesce(sum(credits_posted) FILTER (WHERE kind = 'revenue'), 0)
    FROM billing.account"""


@dataclass(frozen=True, slots=True)
class Difference:
    check: str
    wallet_id: UUID
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was looked at, and at most SAMPLES_MAX differences of each check. Amounts in nano-credits."""

    wallets: int
    transfers: int
    holds: int
    open_holds: int
    granted: int
    spent: int
    checks: int
    differences: tuple[Difference, ...]

    @property
    def is_clean(self) -> bool:
        return not self.differences

    def lines(self) -> list[str]:
        """For people: one line a difference, then the sums."""
        verdict = "no difference" if self.is_clean else f"{len(self.differences)} differences shown"
        return [
            *(f"DIFFERS  {d.check}: wallet {d.wallet_id}: {d.detail}" for d in self.differences),
            f"{self.wallets} wallets, {self.transfers} transfers, {self.holds} holds ({self.open_holds} open)",
            f"{format_credits(self.granted)} credits granted, {format_credits(self.spent)} spent",
            f"{self.checks} checks: {verdict}",
        ]


async def verify(url: str) -> Report:
    """Examine one snapshot, as the service's own role; reads only."""
    connection = await asyncpg.connect(dsn(url), timeout=10)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}")
            return await examine(connection)
    finally:
        await connection.close()


async def examine(connection: asyncpg.Connection) -> Report:
    """Run every check in the connection's transaction."""
    totals = await connection.fetchrow(_TOTALS)
    differences = []
    for name, query in CHECKS.items():
        rows = await connection.fetch(f"{query} LIMIT {SAMPLES_MAX}")
        differences += [Difference(name, row[0], row[1]) for row in rows]
    wallets, transfers, holds, open_holds, granted, spent = map(int, totals)
    return Report(wallets, transfers, holds, open_holds, granted, spent, len(CHECKS), tuple(differences))
