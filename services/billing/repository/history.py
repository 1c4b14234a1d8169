"""What people look up: a wallet's sums, its transactions and its usage. Every query is of one wallet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID

from services.billing.domain import WalletView
from services.billing.repository.database import Database


@dataclass(frozen=True, slots=True)
class TransactionRow:
    """One transfer as its wallet sees it; `usage` fields are None where no tokens were involved."""

    seq: int
    id: UUID
    kind: str
    amount: int
    balance_after: int
    hold_id: UUID | None
    created_at: datetime
    effective_at: datetime
    model: str | None
    build: str | None
    input_tokens: int | None
    cached_input_tokens: int | None
    output_tokens: int | None
    reason: str | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One part of a request's usage."""

    hold_id: UUID
    part: int
    user_id: UUID | None
    key_id: UUID | None
    model: str
    build: str
    price_id: UUID
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost: int
    finish_reason: str
    duration_ms: int
    request_id: str
    created_at: datetime


async def wallet(database: Database, org_id: UUID) -> WalletView | None:
    """The sums of a wallet now; None when it was never opened."""
    row = await database.fetchrow(
        """SELECT
            coalesce(sum(a.credits_posted - a.debits_posted) FILTER (WHERE a.limited), 0)::int8 AS balance,
            coalesce(sum(a.debits_pending) FILTER (WHERE a.limited), 0)::int8 AS held,
            coalesce(sum(a.credits_posted - a.debits_posted - a.debits_pending) FILTER (
                WHERE a.limited AND (g.expires_at IS NULL OR g.expires_at > clock_timestamp())), 0)::int8 AS available,
            sum(a.debits_posted - a.credits_posted) FILTER (WHERE a.kind = 'receivable')::int8 AS receivable,
            sum(a.debits_posted) FILTER (WHERE a.kind = 'funding')::int8 AS granted,
            sum(a.credits_posted - a.debits_posted) FILTER (WHERE a.kind = 'revenue')::int8 AS spent,
            w.frozen_at IS NOT NULL AS is_frozen, w.created_at,
            CASE WHEN w.frozen_at IS NOT NULL THEN (SELECT f.reason FROM billing.audit f
                WHERE f.wallet_id = w.id AND f.kind = 'freeze' ORDER BY f.op_id DESC LIMIT 1) END AS frozen_reason
        FROM billing.wallet w
        JOIN billing.account a ON a.wallet_id = w.id
        LEFT JOIN billing.credit_grant g ON g.account_id = a.id
        WHERE w.id = $1 GROUP BY w.id""",
        org_id,
    )
    return WalletView(org_id, **dict(row)) if row else None


async def lacks_signup(database: Database, org_id: UUID, user_id: UUID) -> bool:
    """Whether neither this person nor this wallet has had sign-up credits."""
    row = await database.fetchrow(
        """SELECT NOT EXISTS (SELECT FROM billing.credit_grant WHERE wallet_id = $1 AND source = 'signup')
            AND NOT EXISTS (SELECT FROM billing.op WHERE tenant = $2 AND idem_key = 'signup:' || $2::text)""",
        org_id,
        user_id,
    )
    return bool(row[0])


_TRANSACTIONS = """
    SELECT t.wallet_seq, t.id, t.code, t.amount, t.balance_after, t.hold_id, t.booked_at, t.effective_at,
        h.model, u.build, u.input_tokens, u.cached_input_tokens, u.output_tokens,
        coalesce(a.reason, g.reason), g.expires_at
    FROM billing.transfer t
    LEFT JOIN billing.hold h ON h.id = t.hold_id
    LEFT JOIN billing.usage u ON u.hold_id = t.hold_id AND u.op_id = t.op_id
    LEFT JOIN billing.credit_grant g ON g.account_id = t.credit_account AND t.code IN ('grant', 'refund')
    LEFT JOIN billing.audit a ON a.wallet_id = t.wallet_id AND a.op_id = t.op_id
        AND t.code IN ('charge', 'refund', 'reversal')
    WHERE t.wallet_id = $1 AND t.wallet_seq > $2 AND t.wallet_seq <= $3
        AND ($4::text[] IS NULL OR t.code = ANY($4))
        AND ($5::text IS NULL OR h.model = $5)
        AND ($6::uuid IS NULL OR h.key_id = $6)
        AND ($7::uuid IS NULL OR h.user_id = $7)"""


@dataclass(frozen=True, slots=True)
class TransactionFilter:
    """Which transactions; None asks for no more. Model, key and member exist only for those of requests."""

    kinds: tuple[str, ...] | None = None
    model: str | None = None
    key_id: UUID | None = None
    user_id: UUID | None = None

    def arguments(self) -> tuple[object, ...]:
        return (None if self.kinds is None else list(self.kinds), self.model, self.key_id, self.user_id)


async def transactions(
    database: Database,
    org_id: UUID,
    wanted: TransactionFilter,
    *,
    after: int,
    until: int,
    limit: int,
    newest_first: bool = True,
) -> list[TransactionRow]:
    """Of the transfers numbered from `after` (not included) to `until`. The wallet's numbers are its order in time."""
    order = "DESC" if newest_first else "ASC"
    rows = await database.fetch(
        f"{_TRANSACTIONS} ORDER BY t.wallet_seq {order} LIMIT $8", org_id, after, until, *wanted.arguments(), limit
    )
    return [TransactionRow(*row) for row in rows]


async def last_seq(database: Database, org_id: UUID) -> int:
    """The number of the wallet's last transfer; 0 for none, and for no wallet."""
    row = await database.fetchrow("SELECT seq FROM billing.wallet WHERE id = $1", org_id)
    return int(row[0]) if row else 0


async def usage(database: Database, org_id: UUID, *, before: tuple[UUID, int] | None, limit: int) -> list[UsageRecord]:
    """Newest requests first, by the time at which their hold was made."""
    hold_id, part = before or (None, None)
    rows = await database.fetch(
        """SELECT hold_id, part, user_id, key_id, model, build, price_id, input_tokens, cached_input_tokens,
            output_tokens, cost, finish_reason, duration_ms, request_id, created_at
        FROM billing.usage
        WHERE wallet_id = $1 AND ($2::uuid IS NULL OR (hold_id, part) < ($2, $3::int2))
        ORDER BY hold_id DESC, part DESC LIMIT $4""",
        org_id,
        hold_id,
        part,
        limit,
    )
    return [UsageRecord(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What requests of one group used; `cost` in nano-credits. A field that is not grouped by is None."""

    day: date | None
    model: str | None
    key_id: UUID | None
    user_id: UUID | None
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost: int


GROUPS = {"day": "day", "model": "model", "key": "key_id", "member": "user_id"}


async def usage_sums(
    database: Database, org_id: UUID, since: date, until: date, groups: Sequence[str], limit: int
) -> list[UsageSum]:
    """From the day's sums that the ledger keeps; `until` is not included. Newest day first, then the dearest."""
    columns = [column if name in groups else "NULL" for name, column in GROUPS.items()]
    grouped = [str(number) for number, column in enumerate(columns, 1) if column != "NULL"]
    rows = await database.fetch(
        f"""SELECT {", ".join(columns)}, sum(requests)::int8, sum(input_tokens)::int8, sum(cached_input_tokens)::int8,
            sum(output_tokens)::int8, sum(cost)::int8
        FROM billing.usage_day WHERE wallet_id = $1 AND day >= $2 AND day < $3
        {f"GROUP BY {', '.join(grouped)}" if grouped else "HAVING count(*) > 0"}
        ORDER BY 1 DESC NULLS LAST, 9 DESC, 2, 3, 4 LIMIT $4""",  # noqa: S608 - columns of ours
        org_id,
        since,
        until,
        limit,
    )
    return [UsageSum(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What somebody did to a wallet by hand, and why. `frozen` is of a freeze, `amount` of the others."""

    id: UUID
    kind: str
    amount: int | None
    frozen: bool | None
    reason: str
    actor: str
    created_at: datetime


async def audit(database: Database, org_id: UUID, *, before: UUID | None, limit: int) -> list[AuditEntry]:
    """Newest first."""
    rows = await database.fetch(
        """SELECT op_id, kind, amount, frozen, reason, actor, created_at FROM billing.audit
        WHERE wallet_id = $1 AND ($2::uuid IS NULL OR op_id < $2) ORDER BY op_id DESC LIMIT $3""",
        org_id,
        before,
        limit,
    )
    return [AuditEntry(*row) for row in rows]
