"""The reconciler walks through everything in bounded steps, freezes what does not add up, and repairs nothing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from services.billing.errors import WalletFrozen
from services.billing.partitions import PartitionMaker
from services.billing.reconciler import LOCK_ID, Reconciler, ReconcilerLimits
from services.billing.repository.checks import CHECKS
from services.billing.repository.verification import Begun, examine, wallets_step
from tests.billing.harness import Ledger, grant, ledger_on, migrate, owner, settle
from tests.conftest import FreshDatabase

PASSES_MAX = 200
SMALL = ReconcilerLimits(interval_s=0.01, wallets_max=3, transfers_max=7, holds_max=5)
TAMPERED = "accounts equal their transfers"


@pytest.fixture
def own_url(fresh_database: FreshDatabase) -> str:
    return fresh_database("reconciler", migrate=migrate)


@pytest.fixture
async def own(own_url: str) -> AsyncIterator[Ledger]:
    """A ledger that nobody else writes to."""
    async with ledger_on(own_url) as ledger:
        yield ledger


async def history(ledger: Ledger, org_id: UUID, operations: int) -> None:
    await ledger.writer.submit(grant(org_id, 100_000))
    for number in range(operations):
        held = await ledger.held(org_id, 10)
        await ledger.writer.submit(settle(org_id, held.hold_id, number % 12))


async def walked_through(ledger: Ledger, reconciler: Reconciler) -> int:
    """Both walks once, from wherever they are; how many passes that took."""
    where = "SELECT walk, after, begun FROM billing.reconciliation ORDER BY walk"
    ends: set[str] = set()
    for number in range(1, PASSES_MAX):
        await reconciler.reconcile()
        ends |= {row["walk"] for row in await ledger.pool.fetch(where) if row["after"] is None and row["begun"] is None}
        if ends == {"wallets", "holds"}:
            return number
    raise AssertionError("the walks do not come to an end")


def examined(ledger: Ledger, what: str) -> float:
    return float(ledger.metrics.reconciled.labels(what)._value.get())


async def test_all_is_walked_through_in_bounded_passes_that_go_on_after_a_restart(own: Ledger) -> None:
    wallets = [uuid4() for _ in range(5)]
    for org_id, operations in zip(wallets, (0, 3, 30, 1, 8), strict=True):
        await history(own, org_id, operations)
    passes = 0
    for _ in range(3):  # a new object knows nothing: where it is, is in the database
        await Reconciler(own.database, own.metrics, SMALL).reconcile()
        passes += 1
    passes += await walked_through(own, Reconciler(own.database, own.metrics, SMALL))
    report = await own.verified()
    assert passes > report.transfers / 20
    assert examined(own, "transfers") >= report.transfers
    assert examined(own, "holds") >= report.holds
    assert await own.pool.fetchval("SELECT count(*) FROM billing.wallet WHERE frozen_at IS NOT NULL") == 0


async def test_a_difference_freezes_that_wallet_alone_and_is_told_not_repaired(own: Ledger) -> None:
    good, bad = uuid4(), uuid4()
    for org_id in (good, bad):
        await history(own, org_id, 20)
    tamper = "UPDATE billing.account SET credits_posted = credits_posted + 7 WHERE wallet_id = $1 AND limited"
    await own.pool.execute(tamper, bad)
    reconciler = Reconciler(own.database, own.metrics, SMALL)
    assert own.metrics.discrepancies.labels(TAMPERED)._value.get() == 0
    await walked_through(own, reconciler)
    assert own.metrics.discrepancies.labels(TAMPERED)._value.get() == 1
    found = await own.pool.fetch("SELECT wallet_id, check_name, detail FROM billing.discrepancy")
    assert {row["wallet_id"] for row in found} == {bad}
    assert TAMPERED in {row["check_name"] for row in found}
    with pytest.raises(WalletFrozen):
        await own.held(bad, 1)
    assert (await own.held(good, 1)).amount == 1
    before = len(found)
    await walked_through(own, reconciler)
    assert await own.pool.fetchval("SELECT count(*) FROM billing.discrepancy") == before, "told once a freeze"
    report_after = await own.pool.fetchval(
        "SELECT sum(credits_posted) FROM billing.account WHERE wallet_id = $1 AND limited", bad
    )
    assert report_after == 100_000 + 7 + await signup(own, bad)


async def signup(ledger: Ledger, org_id: UUID) -> int:
    """What the wallet was given when it was opened."""
    row = await ledger.pool.fetchval(
        """SELECT coalesce(sum(t.amount), 0) FROM billing.transfer t
        JOIN billing.credit_grant g ON g.account_id = t.credit_account
        WHERE t.wallet_id = $1 AND t.code = 'grant' AND g.source = 'signup'""",
        org_id,
    )
    return int(row)


async def test_work_goes_on_beside_it_without_a_false_alarm(own: Ledger) -> None:
    """Each step sees one snapshot: operations in between are whole or not there."""
    rng = random.Random(3)
    wallets = [uuid4() for _ in range(4)]
    reconciler = Reconciler(own.database, own.metrics, SMALL)
    for org_id in wallets:
        await history(own, org_id, 2)
    for _ in range(40):
        org_id = rng.choice(wallets)
        held = await own.held(org_id, 10)
        assert await reconciler.reconcile() == []
        await own.writer.submit(settle(org_id, held.hold_id, rng.randint(0, 12)))
        assert await reconciler.reconcile() == []


async def test_one_process_at_a_time_reconciles(own: Ledger, own_url: str) -> None:
    await history(own, uuid4(), 3)
    other = await owner(own_url)
    try:
        await other.execute("SELECT pg_advisory_lock($1)", LOCK_ID)
        await Reconciler(own.database, own.metrics, SMALL).reconcile()
        assert examined(own, "transfers") == 0
    finally:
        await other.close()


async def test_a_wallet_in_parts_is_found_as_one_in_whole(own: Ledger, own_url: str, org_id: UUID) -> None:
    """Sums and balances are carried from part to part, and parts end where operations do."""
    await own.writer.submit(grant(org_id, 7))
    await own.writer.submit(grant(org_id, 8, priority=10))
    for tokens in (9, 4, 2):  # draws from two or three grants: several transfers an operation
        held = await own.held(org_id, tokens)
        await own.writer.submit(settle(org_id, held.hold_id, tokens))
    connection = await asyncpg.connect(own.url)
    try:
        begun: Begun | None = None
        after: UUID | None = None
        sizes = []
        while True:
            step = await wallets_step(connection, after, begun, transfers_max=1)
            assert step.differences == []
            sizes.append(step.transfers)
            if step.is_last:
                break
            after, begun = step.after, step.begun
        assert max(sizes) > 1
        assert sum(sizes) == await connection.fetchval("SELECT count(*) FROM billing.transfer")
        assert (await examine(connection)).is_clean
    finally:
        await connection.close()


async def test_partitions_are_made_and_measured_by_the_task(own: Ledger) -> None:
    maker = PartitionMaker(own.database, own.metrics, months_ahead=5, interval_s=60)
    await maker.make()
    assert own.metrics.partition_horizon._value.get() > 5 * 28 * 86_400
    assert own.metrics.partition_strays._value.get() == 0


async def test_every_check_is_there_for_the_alert_before_it_finds_anything(own: Ledger) -> None:
    Reconciler(own.database, own.metrics)
    assert {s.labels["check"] for m in own.metrics.discrepancies.collect() for s in m.samples} >= set(CHECKS)


async def test_where_the_reconciler_is_can_be_changed_but_not_what_it_found(own: Ledger) -> None:
    for change in ("UPDATE billing.discrepancy SET detail = ''", "DELETE FROM billing.discrepancy"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await own.pool.execute(change)
