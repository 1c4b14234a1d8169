"""Walks through the books and finds what does not add up, a bounded part at a time.

Two walks: over wallets in order of id, with all their transfers, a wallet of many in parts; and over holds in order of
id, which is time. Each step is one snapshot. `verify` takes both from end to end; the reconciler takes a step of each
now and then, for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg

from services.billing.repository import checks
from shared.database import dsn
from shared.money import format_credits

SAMPLES_MAX = 20
DIFFERENCES_MAX = 100
STATEMENT_TIMEOUT_MS = 10 * 60 * 1000
WALLETS_MAX = 2_000
TRANSFERS_MAX = 50_000
HOLDS_MAX = 20_000
OPERATION_TRANSFERS_MAX = 100_000
NOBODY, EVERYBODY = UUID(int=0), UUID(int=2**128 - 1)


@dataclass(frozen=True, slots=True)
class Difference:
    check: str
    wallet_id: UUID
    detail: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A wallet whose transfers were examined up to `seq`: its balance there, and (debits, credits) by account."""

    wallet_id: UUID
    seq: int
    balance: int
    moved: dict[UUID, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Step:
    """What a step looked at and where the next one goes on: after `after`, within `begun`; both None at the end."""

    after: UUID | None
    begun: Begun | None
    differences: list[Difference]
    wallets: int = 0
    transfers: int = 0
    holds: int = 0
    granted: int = 0
    spent: int = 0

    @property
    def is_last(self) -> bool:
        return self.after is None and self.begun is None


@dataclass(slots=True)
class Report:
    """What was looked at, and at most SAMPLES_MAX differences of each check. Amounts in nano-credits."""

    wallets: int = 0
    transfers: int = 0
    holds: int = 0
    open_holds: int = 0
    granted: int = 0
    spent: int = 0
    checks: int = len(checks.CHECKS)
    found: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.found

    def add(self, step: Step) -> None:
        for name in ("wallets", "transfers", "holds", "granted", "spent"):
            setattr(self, name, getattr(self, name) + getattr(step, name))
        for difference in step.differences:
            self.found[difference.check] += 1
            if self.found[difference.check] <= SAMPLES_MAX:
                self.differences.append(difference)

    def progress(self) -> str:
        return f"{self.wallets} wallets, {self.transfers} transfers, {self.holds} holds"

    def lines(self) -> list[str]:
        """For people: one line a difference, then the sums."""
        total = self.found.total()
        verdict = "no difference" if self.is_clean else f"{total} differences, {len(self.differences)} shown"
        return [
            *(f"DIFFERS  {d.check}: wallet {d.wallet_id}: {d.detail}" for d in self.differences),
            f"{self.progress()} ({self.open_holds} open)",
            f"{format_credits(self.granted)} credits granted, {format_credits(self.spent)} spent",
            f"{self.checks} checks: {verdict}",
        ]

    def as_json(self) -> dict[str, Any]:
        """For programs; amounts as decimal strings of credits."""
        names = ("wallets", "transfers", "holds", "open_holds", "checks")
        return {
            "clean": self.is_clean,
            **{name: getattr(self, name) for name in names},
            "granted": format_credits(self.granted),
            "spent": format_credits(self.spent),
            "found": dict(self.found),
            "differences": [
                {"check": d.check, "wallet_id": str(d.wallet_id), "detail": d.detail} for d in self.differences
            ],
        }


async def verify(url: str, on_progress: Callable[[Report], None] = lambda _: None) -> Report:
    """Examine everything, as the service's own role; reads only. Operations may go on meanwhile."""
    connection = await asyncpg.connect(dsn(url), timeout=10)
    try:
        await connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
        await connection.execute("SET default_transaction_isolation = 'repeatable read'")
        await connection.execute("SET default_transaction_read_only = on")
        return await examine(connection, on_progress)
    finally:
        await connection.close()


async def examine(connection: asyncpg.Connection, on_progress: Callable[[Report], None] = lambda _: None) -> Report:
    """Both walks from end to end; each step in a transaction, or within the one that the connection is in."""
    report = Report(open_holds=await connection.fetchval("SELECT count(*) FROM billing.open_hold"))
    after: UUID | None = None
    begun: Begun | None = None
    while True:
        step = await wallets_step(connection, after, begun)
        report.add(step)
        on_progress(report)
        if step.is_last:
            break
        after, begun = step.after, step.begun
    after = None
    while True:
        step = await holds_step(connection, after)
        report.add(step)
        on_progress(report)
        if step.is_last:
            break
        after = step.after
    report.add(await _strangers(connection))
    return report


async def wallets_step(
    connection: asyncpg.Connection,
    after: UUID | None,
    begun: Begun | None,
    *,
    wallets_max: int = WALLETS_MAX,
    transfers_max: int = TRANSFERS_MAX,
) -> Step:
    """Examine the wallets after `after`, as many as come within the limits, or the next part of one that is begun."""
    async with connection.transaction():
        rows = await connection.fetch(
            "SELECT id, seq FROM billing.wallet WHERE id > $1 ORDER BY id LIMIT $2", after or NOBODY, wallets_max
        )
        batch = _within(rows, begun, transfers_max)
        if not batch:
            return Step(None, None, [])
        wallet_id, seq = batch[0]
        since, balance = (begun.seq, begun.balance) if begun is not None else (0, 0)
        is_part = seq - since > transfers_max
        if is_part:
            batch = [(wallet_id, await _end_of_operation(connection, wallet_id, since + transfers_max))]
        ids, until = [row[0] for row in batch], [row[1] for row in batch]
        arguments = (ids, [since] * len(ids), until, [balance] * len(ids), *_columns(begun))
        differences = await _differences(connection, checks.TRANSFERS, *arguments, beginning=checks.PARTS)
        transfers = sum(until) - since * len(ids)
        if is_part:
            carried = await _carried(connection, wallet_id, until[0], arguments)
            return Step(after, carried, differences, transfers=transfers)
        differences += await _differences(connection, checks.BOOKS, *arguments, beginning=checks.PARTS)
        granted, spent = await _sums(connection, ids)
    return Step(ids[-1], None, differences, len(ids), transfers, granted=granted, spent=spent)


async def holds_step(connection: asyncpg.Connection, after: UUID | None, *, holds_max: int = HOLDS_MAX) -> Step:
    """Examine the holds after `after`, at most so many."""
    after = after or NOBODY
    async with connection.transaction():
        last, count = await connection.fetchrow(
            """SELECT (array_agg(id ORDER BY id DESC))[1], count(*) FROM (
                SELECT id FROM billing.hold WHERE id > $1 ORDER BY id LIMIT $2) h""",
            after,
            holds_max,
        )
        is_last = count < holds_max
        # Whatever claims to belong to a later hold belongs to none.
        differences = await _differences(connection, checks.HOLDS, after, EVERYBODY if is_last else last)
    return Step(None if is_last else last, None, differences, holds=count)


async def hold_differences(connection: asyncpg.Connection, hold_id: UUID) -> list[Difference]:
    """What does not add up of one hold."""
    return await _differences(connection, checks.HOLDS, UUID(int=hold_id.int - 1), hold_id)


async def _strangers(connection: asyncpg.Connection) -> Step:
    """Transfers of wallets that are not there: a walk over wallets does not come to them."""
    rows = await connection.fetch(
        """SELECT t.wallet_id, format('%s transfers', count(*)) FROM billing.transfer t
        WHERE NOT EXISTS (SELECT FROM billing.wallet w WHERE w.id = t.wallet_id) GROUP BY t.wallet_id LIMIT $1""",
        DIFFERENCES_MAX,
    )
    return Step(None, None, [Difference(checks.STRANGERS, *row) for row in rows])


def _within(rows: Iterable[Any], begun: Begun | None, transfers_max: int) -> list[tuple[UUID, int]]:
    """The first wallets whose transfers come to no more than that, or one with more; only the one that is begun."""
    batch: list[tuple[UUID, int]] = []
    rest = transfers_max
    for wallet_id, seq in rows:
        rest -= seq
        if batch and rest < 0:
            break
        batch.append((wallet_id, seq))
        if begun is not None:
            break
    return batch


async def _end_of_operation(connection: asyncpg.Connection, wallet_id: UUID, seq: int) -> int:
    """The number of the last transfer of the operation that `seq` belongs to: parts end where operations do."""
    end: int | None = await connection.fetchval(
        """SELECT max(n.wallet_seq) FROM billing.transfer t JOIN billing.transfer n
            ON n.wallet_id = t.wallet_id AND n.wallet_seq >= t.wallet_seq AND n.wallet_seq <= $2::int8 + $3::int8
            AND n.op_id = t.op_id
        WHERE t.wallet_id = $1 AND t.wallet_seq = $2""",
        wallet_id,
        seq,
        OPERATION_TRANSFERS_MAX,
    )
    return seq if end is None else end


async def _carried(
    connection: asyncpg.Connection, wallet_id: UUID, seq: int, arguments: Sequence[Sequence[object]]
) -> Begun:
    moved = {
        row[0]: (int(row[1]), int(row[2]))
        for row in await connection.fetch(f"{checks.PARTS}{checks.MOVED}", *arguments)
    }
    balance = await connection.fetchval(
        "SELECT balance_after FROM billing.transfer WHERE wallet_id = $1 AND wallet_seq = $2", wallet_id, seq
    )
    return Begun(wallet_id, seq, balance or 0, moved)


def _columns(begun: Begun | None) -> tuple[list[UUID], list[Decimal], list[Decimal]]:
    moved = begun.moved if begun is not None else {}
    return list(moved), [Decimal(d) for d, _ in moved.values()], [Decimal(c) for _, c in moved.values()]


async def _differences(
    connection: asyncpg.Connection, queries: Iterable[str], *arguments: object, beginning: str = ""
) -> list[Difference]:
    """At most DIFFERENCES_MAX of each query."""
    found: list[Difference] = []
    for query in queries:
        rows = await connection.fetch(f"{beginning}{query} LIMIT {DIFFERENCES_MAX}", *arguments)
        found += [Difference(*row) for row in rows]
    return found


async def _sums(connection: asyncpg.Connection, wallets: Sequence[UUID]) -> tuple[int, int]:
    row = await connection.fetchrow(
        """SELECT coalesce(sum(debits_posted) FILTER (WHERE kind = 'funding'), 0),
            coalesce(sum(credits_posted) FILTER (WHERE kind = 'revenue'), 0)
        FROM billing.account WHERE wallet_id = ANY($1)""",
        wallets,
    )
    return int(row[0]), int(row[1])
