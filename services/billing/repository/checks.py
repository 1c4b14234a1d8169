"""What must be true of the books, as SQL that finds where it is not: a second implementation of the kernel's rules.

Costs and balances are computed by PostgreSQL, not by the kernel. Every query answers with (check, wallet, detail) for
each difference, and looks at a bounded part: some wallets' transfers up to a number, some whole wallets, or a range of
holds. Wallets and holds are examined in one snapshot each: an operation is one transaction, and touches one wallet.
"""

from __future__ import annotations

_COST = """p.per_request + div(({input} - {cached})::numeric * p.input + {cached}::numeric * p.cached_input
        + {output}::numeric * p.output + 999999, 1000000)"""


def _cost(tokens: str) -> str:
    """The cost of a request as SQL; `tokens` is a template of the columns' names."""
    columns = {k: tokens.format(c) for k, c in (("input", "input"), ("cached", "cached_input"), ("output", "output"))}
    return _COST.format(**columns)


# What every query of TRANSFERS and BOOKS begins with.
# Wallets with the last number examined before, the last one to examine now, and the balance at the former; and what
# the accounts of a wallet that is examined in parts have moved before.
PARTS = """
    WITH w AS (
        SELECT * FROM unnest($1::uuid[], $2::int8[], $3::int8[], $4::int8[]) AS w(id, since, until, balance)),
    carried AS (
        SELECT * FROM unnest($5::uuid[], $6::numeric[], $7::numeric[]) AS c(account, debits, credits)),
    t AS (
        SELECT t.*, w.since, w.until, w.balance FROM w JOIN billing.transfer t
            ON t.wallet_id = w.id AND t.wallet_seq > w.since AND t.wallet_seq <= w.until)"""

STRANGERS = "transfers stay within their wallet"
CHECKS = (
    "transfers are numbered without a gap",
    "transfers are in order of time",
    STRANGERS,
    "balances follow from the transfers",
    "transfers belong to operations that were applied",
    "accounts equal their transfers",
    "debits equal credits",
    "what is pending equals the slices of open holds",
    "who owes has nothing available",
    "usage by day equals the transfers of usage",
    "charges by day equal the transfers of charges",
    "what belongs to a hold has one",
    "holds are covered by their slices",
    "holds cost what their price says",
    "holds are open or resolved",
    "usage costs what its price says",
    "usage is paid or owed",
    "resolutions say what was taken",
    "settled holds have usage, voided ones have none",
    "holds and resolutions are remembered as they were decided",
)

# Of transfers, in parts of any size that end where an operation does.
TRANSFERS = (
    """, line AS (
        SELECT t.*, d.wallet_id AS d_wallet, c.wallet_id AS c_wallet,
            t.since + row_number() OVER numbers AS number, lag(t.booked_at) OVER numbers AS earlier,
            t.balance + sum(CASE WHEN c.limited THEN t.amount ELSE 0 END - CASE WHEN d.limited THEN t.amount ELSE 0 END)
                OVER numbers AS replayed
        FROM t LEFT JOIN billing.account d ON d.id = t.debit_account
            LEFT JOIN billing.account c ON c.id = t.credit_account
        WINDOW numbers AS (PARTITION BY t.wallet_id ORDER BY t.wallet_seq))
    SELECT v.name, line.wallet_id, v.detail FROM line CROSS JOIN LATERAL (VALUES
        ('transfers are numbered without a gap',
            wallet_seq <> number, format('number %s comes as the %s.', wallet_seq, number)),
        ('transfers are in order of time',
            booked_at < earlier, format('transfer %s: %s after %s', id, booked_at, earlier)),
        ('transfers stay within their wallet',
            d_wallet IS DISTINCT FROM wallet_id OR c_wallet IS DISTINCT FROM wallet_id,
            format('transfer %s', id)),
        ('balances follow from the transfers', balance_after <> replayed,
            format('transfer %s: balance_after is %s, replayed %s', id, balance_after, replayed))
    ) AS v(name, differs, detail) WHERE v.differs""",
    """
    SELECT 'transfers are numbered without a gap',
        w.id, format('%s transfers from %s to %s', count(t.id), w.since + 1, w.until)
    FROM w LEFT JOIN t ON t.wallet_id = w.id GROUP BY w.id, w.since, w.until HAVING count(t.id) <> w.until - w.since""",
    # Those of usage are compared with what is remembered of their hold. LIMIT makes this a look at the index for each.
    """
    SELECT 'transfers belong to operations that were applied', t.wallet_id, format('transfer %s', t.id)
    FROM t LEFT JOIN LATERAL (
        SELECT true AS is_there FROM billing.op o WHERE o.id = t.op_id AND o.refusal IS NULL LIMIT 1) o ON true
    WHERE t.code NOT IN ('usage', 'late', 'receivable') AND o.is_there IS NULL""",
)

# Of wallets, once all their transfers were examined.
BOOKS = (
    """
    SELECT 'transfers are numbered without a gap',
        b.id, format('the wallet says %s, there is %s', b.seq, max(t.wallet_seq))
    FROM w JOIN billing.wallet b ON b.id = w.id JOIN billing.transfer t ON t.wallet_id = w.id AND t.wallet_seq > b.seq
    GROUP BY b.id""",
    """, moved AS (
        SELECT account, sum(debits) AS debits, sum(credits) AS credits FROM (
            SELECT debit_account AS account, amount AS debits, 0 AS credits FROM t
            UNION ALL SELECT credit_account, 0, amount FROM t
            UNION ALL SELECT * FROM carried) legs GROUP BY account)
    SELECT 'accounts equal their transfers', a.wallet_id,
        format('account %s (%s): %s debited and %s credited, but the counters say %s and %s',
            a.id, a.kind, coalesce(m.debits, 0), coalesce(m.credits, 0), a.debits_posted, a.credits_posted)
    FROM w JOIN billing.account a ON a.wallet_id = w.id LEFT JOIN moved m ON m.account = a.id
    WHERE a.debits_posted <> coalesce(m.debits, 0) OR a.credits_posted <> coalesce(m.credits, 0)""",
    """
    SELECT 'debits equal credits', a.wallet_id, format('posted %s and %s, pending %s and %s', sum(debits_posted),
        sum(credits_posted), sum(debits_pending), sum(credits_pending))
    FROM w JOIN billing.account a ON a.wallet_id = w.id GROUP BY a.wallet_id
    HAVING sum(debits_posted) <> sum(credits_posted) OR sum(debits_pending) <> sum(credits_pending)""",
    """, slices AS (
        SELECT s.account_id, sum(s.amount) AS amount
        FROM billing.open_hold o JOIN billing.hold_slice s ON s.hold_id = o.hold_id
        WHERE o.wallet_id = ANY($1) GROUP BY s.account_id)
    SELECT 'what is pending equals the slices of open holds',
        a.wallet_id, format('account %s (%s): %s pending, open slices are %s',
        a.id, a.kind, a.debits_pending, coalesce(s.amount, 0))
    FROM w JOIN billing.account a ON a.wallet_id = w.id LEFT JOIN slices s ON s.account_id = a.id
    WHERE a.debits_pending <> coalesce(s.amount, 0) OR (a.kind <> 'revenue' AND a.credits_pending <> 0)""",
    # What has expired is not available, though the sweeper may not have moved it yet.
    """
    SELECT 'who owes has nothing available', r.wallet_id, format('owes %s', r.debits_posted - r.credits_posted)
    FROM w JOIN billing.account r ON r.wallet_id = w.id AND r.kind = 'receivable' AND r.debits_posted > r.credits_posted
    WHERE EXISTS (
        SELECT FROM billing.account a JOIN billing.credit_grant g ON g.account_id = a.id
        WHERE a.wallet_id = w.id AND a.credits_posted > a.debits_posted + a.debits_pending
            AND (g.expires_at IS NULL OR g.expires_at > clock_timestamp()))""",
    """, used AS (
        SELECT coalesce(sum(amount), 0) AS amount, wallet_id FROM t
        WHERE code IN ('usage', 'late', 'receivable') GROUP BY wallet_id),
    days AS (
        SELECT wallet_id, sum(cost) AS cost FROM billing.usage_day WHERE wallet_id = ANY($1) GROUP BY wallet_id)
    SELECT 'usage by day equals the transfers of usage', x.id, format('by day %s, transfers %s', x.cost, x.amount)
    FROM (
        SELECT w.id, coalesce(d.cost, 0) AS cost, coalesce(u.amount, 0) + coalesce(c.debits, 0) AS amount
        FROM w LEFT JOIN used u ON u.wallet_id = w.id LEFT JOIN days d ON d.wallet_id = w.id
            LEFT JOIN carried c ON c.account = '00000000-0000-0000-0000-000000000000') x
    WHERE x.cost <> x.amount""",
    """, charged AS (
        SELECT coalesce(sum(amount), 0) AS amount, wallet_id FROM t WHERE code = 'charge' GROUP BY wallet_id),
    days AS (
        SELECT wallet_id, sum(amount) AS amount FROM billing.charge_day WHERE wallet_id = ANY($1) GROUP BY wallet_id)
    SELECT 'charges by day equal the transfers of charges', x.id,
        format('by day %s, transfers %s', x.by_day, x.amount)
    FROM (
        SELECT w.id, coalesce(d.amount, 0) AS by_day, coalesce(c.amount, 0) + coalesce(k.debits, 0) AS amount
        FROM w LEFT JOIN charged c ON c.wallet_id = w.id LEFT JOIN days d ON d.wallet_id = w.id
            LEFT JOIN carried k ON k.account = '00000000-0000-0000-0000-000000000001') x
    WHERE x.by_day <> x.amount""",
)

# Of holds: after $1, up to $2. A look at the index for each hold costs the same whatever the planner knows of a table.
HOLDS = (
    """SELECT 'what belongs to a hold has one', coalesce(x.wallet_id, '00000000-0000-0000-0000-000000000000'),
        format('%s of hold %s', x.what, x.hold_id)
    FROM (
        SELECT 'a slice' AS what, s.hold_id, a.wallet_id FROM billing.hold_slice s
            LEFT JOIN billing.account a ON a.id = s.account_id WHERE s.hold_id > $1 AND s.hold_id <= $2
        UNION ALL SELECT 'usage', hold_id, wallet_id FROM billing.usage WHERE hold_id > $1 AND hold_id <= $2
        UNION ALL SELECT 'open', hold_id, wallet_id FROM billing.open_hold WHERE hold_id > $1 AND hold_id <= $2
        UNION ALL SELECT 'a transfer', hold_id, wallet_id FROM billing.transfer
            WHERE hold_id > $1 AND hold_id <= $2 AND code IN ('usage', 'late', 'receivable')
        UNION ALL SELECT 'resolution', hold_id, NULL FROM billing.hold_resolution
            WHERE hold_id > $1 AND hold_id <= $2
        UNION ALL SELECT 'extension', hold_id, NULL FROM billing.hold_extension
            WHERE hold_id > $1 AND hold_id <= $2) x
    WHERE NOT EXISTS (SELECT FROM billing.hold h
        WHERE h.id = x.hold_id
            AND (x.what IN ('resolution', 'extension') OR h.wallet_id IS NOT DISTINCT FROM x.wallet_id))""",
    """SELECT 'holds are covered by their slices',
        h.wallet_id, format('hold %s: %s, slices are %s', h.id, h.amount + e.amount, coalesce(s.amount, 0))
    FROM billing.hold h CROSS JOIN LATERAL (
        SELECT sum(amount) AS amount FROM billing.hold_slice WHERE hold_id = h.id) s
        CROSS JOIN LATERAL (
        SELECT coalesce(sum(amount), 0) AS amount FROM billing.hold_extension WHERE hold_id = h.id) e
    WHERE h.id > $1 AND h.id <= $2 AND h.amount + e.amount <> coalesce(s.amount, 0)""",
    """SELECT 'holds cost what their price says', h.wallet_id, format('hold %s: %s', h.id, h.amount)
    FROM billing.hold h JOIN billing.price p ON p.id = h.price_id
    WHERE h.id > $1 AND h.id <= $2 AND h.amount <> HOLD_COST
    UNION ALL
    SELECT 'holds cost what their price says', x.wallet_id, format('hold %s, extension %s: %s in all', x.id, x.number,
        x.total)
    FROM (SELECT h.id, h.wallet_id, h.price_id, h.input_tokens, h.cached_input_tokens, e.number, e.output_tokens,
            h.amount + sum(e.amount) OVER (PARTITION BY e.hold_id ORDER BY e.output_tokens) AS total
        FROM billing.hold_extension e JOIN billing.hold h ON h.id = e.hold_id
        WHERE e.hold_id > $1 AND e.hold_id <= $2) x
        JOIN billing.price p ON p.id = x.price_id
    WHERE x.total <> EXTENDED_COST""".replace("HOLD_COST", _cost("h.{}_tokens")).replace(
        "EXTENDED_COST", _cost("x.{}_tokens")
    ),
    """SELECT 'holds are open or resolved', h.wallet_id, format('hold %s', h.id)
    FROM billing.hold h LEFT JOIN billing.open_hold o ON o.hold_id = h.id
        LEFT JOIN billing.hold_resolution r ON r.hold_id = h.id
    WHERE h.id > $1 AND h.id <= $2 AND (o.hold_id IS NULL) = (r.hold_id IS NULL)""",
    """WITH running AS (
        SELECT u.*, sum(u.cost) OVER parts AS total, sum(u.input_tokens) OVER parts AS all_input,
            sum(u.cached_input_tokens) OVER parts AS all_cached_input, sum(u.output_tokens) OVER parts AS all_output
        FROM billing.usage u WHERE u.hold_id > $1 AND u.hold_id <= $2
        WINDOW parts AS (PARTITION BY u.hold_id ORDER BY u.part))
    SELECT 'usage costs what its price says', r.wallet_id, format('hold %s part %s: %s', r.hold_id, r.part, r.cost)
    FROM running r JOIN billing.price p ON p.id = r.price_id
    WHERE r.total <> greatest(r.total - r.cost, USAGE_COST)""".replace("USAGE_COST", _cost("r.all_{}")),
    """SELECT 'usage is paid or owed', h.wallet_id,
        format('hold %s: used %s, taken %s', h.id, coalesce(u.cost, 0), coalesce(p.amount, 0))
    FROM billing.hold h
        CROSS JOIN LATERAL (SELECT sum(cost) AS cost FROM billing.usage WHERE hold_id = h.id) u
        CROSS JOIN LATERAL (SELECT sum(amount) AS amount FROM billing.transfer
            WHERE hold_id = h.id AND code IN ('usage', 'late', 'receivable')) p
    WHERE h.id > $1 AND h.id <= $2 AND coalesce(u.cost, 0) <> coalesce(p.amount, 0)""",
    """SELECT 'resolutions say what was taken', h.wallet_id,
        format('hold %s: %s, transfers say %s', h.id, r.amount, coalesce(t.amount, 0))
    FROM billing.hold h JOIN billing.hold_resolution r ON r.hold_id = h.id
        CROSS JOIN LATERAL (SELECT sum(amount) AS amount FROM billing.transfer
            WHERE hold_id = h.id AND op_id = r.op_id AND code = 'usage') t
    WHERE h.id > $1 AND h.id <= $2 AND r.amount <> coalesce(t.amount, 0)""",
    """SELECT 'settled holds have usage, voided ones have none',
        h.wallet_id, format('hold %s: %s', h.id, coalesce(r.kind, 'open'))
    FROM billing.hold h LEFT JOIN billing.hold_resolution r ON r.hold_id = h.id
        LEFT JOIN billing.usage u ON u.hold_id = h.id AND u.part = 0
    WHERE h.id > $1 AND h.id <= $2 AND coalesce(r.kind, 'open') <> 'expire'
        AND (coalesce(r.kind, 'open') = 'post') <> (u.hold_id IS NOT NULL)""",
    # LIMIT makes these looks at the index: with old statistics, a wallet's operations might all be read for each hold.
    """SELECT 'holds and resolutions are remembered as they were decided', h.wallet_id, format('hold %s', h.id)
    FROM billing.hold h LEFT JOIN LATERAL (
        SELECT * FROM billing.op WHERE tenant = h.wallet_id AND idem_key = 'hold:' || h.id LIMIT 1) o ON true
    WHERE h.id > $1 AND h.id <= $2
        AND (o.id IS NULL OR o.refusal IS NOT NULL OR (o.result->>'amount')::int8 IS DISTINCT FROM h.amount)
    UNION ALL
    SELECT 'holds and resolutions are remembered as they were decided', h.wallet_id,
        format('hold %s: extension %s', h.id, e.number)
    FROM billing.hold_extension e JOIN billing.hold h ON h.id = e.hold_id
        LEFT JOIN LATERAL (SELECT * FROM billing.op
            WHERE tenant = h.wallet_id AND idem_key = 'extend:' || h.id || ':' || e.number LIMIT 1) o ON true
    WHERE e.hold_id > $1 AND e.hold_id <= $2 AND (o.id IS DISTINCT FROM e.op_id OR o.refusal IS NOT NULL
        OR (o.result->>'output_tokens')::int8 IS DISTINCT FROM e.output_tokens)
    UNION ALL
    SELECT 'holds and resolutions are remembered as they were decided', h.wallet_id, format('hold %s: %s', h.id, r.kind)
    FROM billing.hold h JOIN billing.hold_resolution r ON r.hold_id = h.id
        LEFT JOIN LATERAL (SELECT * FROM billing.op WHERE tenant = h.wallet_id
            AND idem_key = CASE r.kind WHEN 'post' THEN 'settle:' ELSE r.kind || ':' END || h.id LIMIT 1) o ON true
    WHERE h.id > $1 AND h.id <= $2 AND (o.id IS DISTINCT FROM r.op_id OR o.refusal IS NOT NULL
        OR (r.kind <> 'void' AND (o.result->>'settled')::int8 IS DISTINCT FROM r.amount))""",
)

# What the transfers of a part moved, to be carried into the next one; and, under ids of nobody, what usage came to
# and what charges did.
MOVED = """
    SELECT account, sum(debits), sum(credits) FROM (
        SELECT debit_account AS account, amount AS debits, 0 AS credits FROM t
        UNION ALL SELECT credit_account, 0, amount FROM t
        UNION ALL SELECT '00000000-0000-0000-0000-000000000000', amount, 0 FROM t
            WHERE code IN ('usage', 'late', 'receivable')
        UNION ALL SELECT '00000000-0000-0000-0000-000000000001', amount, 0 FROM t WHERE code = 'charge'
        UNION ALL SELECT * FROM carried) legs GROUP BY account"""
