"""Batches, shards and their leaders: what the writer adds to the kernel and the database."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from prometheus_client import CollectorRegistry

from services.billing.domain import DEFAULT_CLASS
from services.billing.errors import BudgetExceeded, IdempotencyMismatch, LedgerUnavailable, WalletFrozen
from services.billing.ledger import batch, failpoints
from services.billing.ledger.batch import Fenced
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Held, Settled
from services.billing.ledger.shards import ShardLimits, Shards
from services.billing.ledger.writer import NotLeading, WriterLimits
from services.billing.repository import leadership
from services.billing.repository import ledger as repository
from services.billing.repository.leadership import shard_of
from shared.errors import TollgateError
from shared.telemetry import BillingMetrics
from tests.billing.harness import (
    MODEL,
    SHARDS,
    SIGNUP_NANO,
    TERMS,
    Ledger,
    accepts,
    grant,
    kept_running,
    ledger_on,
    place,
    session,
    settle,
    wait_until,
    writer_beside,
)
from tests.conftest import Components


async def epoch_of(ledger: Ledger, org_id: UUID) -> int:
    epoch: int = await ledger.pool.fetchval("SELECT epoch FROM billing.shard WHERE id = $1", shard_of(org_id, SHARDS))
    return epoch


async def operations_of(ledger: Ledger, org_id: UUID) -> int:
    count: int = await ledger.pool.fetchval("SELECT count(*) FROM billing.op WHERE tenant = $1", org_id)
    return count


async def test_a_second_writer_is_fenced_and_writes_nothing(ledger: Ledger, org_id: UUID) -> None:
    """It believes that it leads; only the epoch says that it does not."""
    await ledger.held(org_id, 1)
    before = await operations_of(ledger, org_id)
    stale = writer_beside(ledger, shard_of(org_id, SHARDS))
    async with session(ledger) as connection:
        serving = asyncio.create_task(stale.serve(connection, await epoch_of(ledger, org_id) - 1, asyncio.Event()))
        await wait_until(lambda: accepts(stale), "the second writer")
        answer = stale.enqueue(place(org_id, 5))
        with pytest.raises(Fenced):
            await serving
    stale.release()
    with pytest.raises(NotLeading):
        await answer
    assert await operations_of(ledger, org_id) == before
    assert (await ledger.wallet(org_id)).held == 1


async def test_a_leader_that_was_overtaken_leads_again_only_with_a_new_epoch(lonely_url: str, org_id: UUID) -> None:
    async with ledger_on(lonely_url) as ledger:
        await ledger.held(org_id, 1)
        before = await epoch_of(ledger, org_id)
        await ledger.pool.execute("UPDATE billing.shard SET epoch = epoch + 1")
        held = await ledger.held(org_id, 2)
        assert await epoch_of(ledger, org_id) == before + 2
        assert isinstance(await ledger.writer.submit(settle(org_id, held.hold_id, 2)), Settled)
        assert (await ledger.wallet(org_id)).spent == 2
        await ledger.verified()


async def test_an_idle_leader_notices_that_its_session_has_ended(
    lonely_url: str, components: Components, org_id: UUID
) -> None:
    async with ledger_on(lonely_url) as ledger:
        before = await epoch_of(ledger, org_id)
        kill = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tollgate-billing-writer'"
        )
        await asyncio.to_thread(components.postgres.execute, f"{kill} AND datname = '{urlsplit(lonely_url).path[1:]}'")

        async def led_anew() -> bool:
            return await epoch_of(ledger, org_id) > before

        await wait_until(led_anew, "the new epoch")


async def test_a_new_leader_waits_for_the_transaction_of_the_former_one(ledger: Ledger, org_id: UUID) -> None:
    shard = shard_of(org_id, SHARDS)
    async with session(ledger) as former, session(ledger) as new:
        await former.execute(repository.BEGIN)
        await repository.first_look(former, shard, [], [])
        rising = asyncio.create_task(leadership.raise_epoch(new, shard, SHARDS, "new"))
        await asyncio.wait([rising], timeout=0.3)
        assert not rising.done()
        await former.execute("COMMIT;")
        assert await rising > 0


async def test_processes_share_the_shards_and_take_over_from_each_other(lonely_url: str) -> None:
    async with ledger_on(lonely_url) as first:
        assert len(first.writer.led) == SHARDS
        async with ledger_on(lonely_url) as second:

            async def even() -> bool:
                return len(first.writer.led) == len(second.writer.led) == SHARDS // 2

            await wait_until(even, "an even share")
            wallets = [uuid4() for _ in range(20)]
            for ledger in (first, second):
                holds = await asyncio.gather(*(ledger.held(org_id, 10) for org_id in wallets))
                assert {type(held) for held in holds} == {Held}

        async def alone() -> bool:
            return len(first.writer.led) == SHARDS

        await wait_until(alone, "the shards of the process that ended")
        await first.held(uuid4(), 10)
        await first.verified()


async def test_another_number_of_shards_is_not_led_beside_the_present_one(lonely_url: str) -> None:
    async with ledger_on(lonely_url) as ledger:
        limits = ShardLimits(shards=SHARDS + 1, balance_interval_s=0.05, lock_interval_s=0.02)
        metrics = BillingMetrics(CollectorRegistry())
        other = Shards(
            ledger.database, ledger.url, Nobody(), address="other", signup_credits=0, metrics=metrics, limits=limits
        )
        async with kept_running(other.run):
            await ledger.held(uuid4(), 10)
            await asyncio.sleep(0.3)
            assert other.led == []
            with pytest.raises(LedgerUnavailable):
                await other.check()
        assert await ledger.pool.fetchval("SELECT count(*) FROM billing.shard") == SHARDS


class Nobody:
    """No other process."""

    async def forward(self, address: str, operation: Operation) -> Any:
        raise LedgerUnavailable()


async def test_a_full_queue_says_so_at_once(lonely_url: str, org_id: UUID) -> None:
    limits = WriterLimits(operations_in_flight_max=5)
    async with ledger_on(lonely_url, limits=limits) as ledger:
        async with ledger.stalled(org_id):
            waiting = [asyncio.create_task(ledger.writer.submit(place(org_id, 1))) for _ in range(20)]
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refused = done.pop().exception()
            assert isinstance(refused, LedgerUnavailable)
            assert (refused.code, refused.status) == ("billing_overloaded", 503)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        held = sum(isinstance(answer, Held) for answer in answers)
        assert held >= 5
        assert (await ledger.wallet(org_id)).held == held


async def test_one_operation_that_cannot_be_written_does_not_take_its_batch_with_it(
    ledger: Ledger, org_id: UUID
) -> None:
    """A hold's id that another wallet has used: the primary key ends the batch."""
    shard = shard_of(org_id, SHARDS)
    wallets = [org_id, *(w for w in (uuid4() for _ in range(40)) if shard_of(w, SHARDS) == shard)]
    for wallet in wallets:
        await ledger.writer.submit(grant(wallet, 100))
    taken = await ledger.held(wallets[1], 1, user_id=None)
    async with ledger.stalled(org_id):
        holds = [place(wallet, 10, user_id=None) for wallet in wallets]
        holds[0] = place(org_id, 10, user_id=None, hold_id=taken.hold_id)
        waiting = [asyncio.create_task(ledger.writer.submit(hold)) for hold in holds]
        await wait_until(lambda: queued(ledger, org_id, len(holds)), "the batch")
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers[0], IdempotencyMismatch)
    assert all(isinstance(answer, Held) for answer in answers[1:]), answers
    await ledger.verified()


async def queued(ledger: Ledger, org_id: UUID, operations: int) -> bool:
    return ledger.writer.writer_of(org_id).waiting >= operations


async def test_a_budget_of_a_key_or_a_member_limits_what_is_spent_and_held(ledger: Ledger, org_id: UUID) -> None:
    key_id, member, other = uuid4(), uuid4(), uuid4()
    await ledger.held(org_id, 1, user_id=other)
    budget = """INSERT INTO billing.budget (wallet_id, subject, subject_id, period, amount, updated_at)
        VALUES ($1, $2, $3, $4, $5, now())"""
    await ledger.pool.execute(budget, org_id, "key", key_id, "day", 100)
    await ledger.pool.execute(budget, org_id, "member", member, "month", 150)
    first = await ledger.held(org_id, 80, key_id=key_id, user_id=member)
    with pytest.raises(BudgetExceeded):
        await ledger.held(org_id, 30, key_id=key_id, user_id=other)
    await ledger.writer.submit(settle(org_id, first.hold_id, 50))
    clamped = await ledger.held(org_id, 90, key_id=key_id, user_id=other, clamp=True)
    assert clamped.output_tokens == 50
    with pytest.raises(BudgetExceeded):
        await ledger.held(org_id, 101, user_id=member)
    assert (await ledger.held(org_id, 100, user_id=member)).amount == 100
    assert (await ledger.held(org_id, 200, user_id=other)).amount == 200
    await ledger.pool.execute("UPDATE billing.budget SET amount = 400 WHERE subject_id = $1", member)
    await ledger.held(org_id, 101, user_id=member)


async def new_price(ledger: Ledger) -> None:
    """Of a model that nobody asks for: what writers remember of prices is old."""
    await ledger.prices.bring_up_to_date(f"model-{uuid4().hex[:8]}", DEFAULT_CLASS, TERMS, "test")


async def test_while_prices_are_few_no_wallet_is_asked_for_its_own(
    ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asked(connection: Any, wanted: Any) -> Any:
        raise AssertionError(wanted)

    monkeypatch.setattr(repository, "load_prices", asked)
    await new_price(ledger)
    for wallet in (org_id, uuid4(), uuid4()):
        await ledger.held(wallet, 1)


async def test_what_is_remembered_of_prices_has_a_bound(
    ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each organisation may have a price of its own, and that it has none is remembered too."""
    monkeypatch.setattr(batch, "PRICES_AT_ONCE_MAX", 0)
    monkeypatch.setattr(batch, "PRICES_MAX", 4)
    await new_price(ledger)
    loaded = []

    async def load_prices(connection: Any, wanted: Any) -> Any:
        loaded.append(set(wanted))
        return await load(connection, wanted)

    load = repository.load_prices
    monkeypatch.setattr(repository, "load_prices", load_prices)
    for _ in range(10):
        await ledger.held(org_id, 1)
        other = next(w for w in iter(uuid4, None) if shard_of(w, SHARDS) == shard_of(org_id, SHARDS))
        await ledger.held(other, 1)
    default = sum((MODEL, DEFAULT_CLASS) in pairs for pairs in loaded)
    assert default > 1, "nothing was forgotten"


async def test_whoever_freezes_a_wallet_while_a_batch_is_decided_is_not_overwritten(
    ledger: Ledger, components: Components, org_id: UUID
) -> None:
    held = await ledger.held(org_id, 10)
    database = urlsplit(ledger.owner_url).path[1:]
    freeze = f"UPDATE billing.wallet SET frozen_at = now() WHERE id = '{org_id}'"
    failpoints.arm("batch_decided", lambda: print(components.postgres.execute(freeze, database=database)))
    try:
        await ledger.writer.submit(settle(org_id, held.hold_id, 4))
    finally:
        failpoints.disarm()
    assert (await ledger.wallet(org_id)).is_frozen
    with pytest.raises(WalletFrozen):
        await ledger.held(org_id, 1)


async def test_the_days_sums_are_those_of_the_usage(ledger: Ledger, org_id: UUID) -> None:
    rng, key_id = random.Random(3), uuid4()
    for n in range(12):
        held = await ledger.held(org_id, 50, key_id=key_id if n % 2 else None)
        await ledger.writer.submit(settle(org_id, held.hold_id, rng.randint(0, 50)))
    sums = """SELECT key_id, user_id, {} FROM billing.{} WHERE wallet_id = $1 GROUP BY 1, 2 ORDER BY 1, 2"""
    days = await ledger.pool.fetch(sums.format("sum(requests), sum(output_tokens), sum(cost)", "usage_day"), org_id)
    usage = await ledger.pool.fetch(sums.format("count(*), sum(output_tokens), sum(cost)", "usage"), org_id)
    assert [tuple(row) for row in days] == [tuple(row) for row in usage]
    assert len(days) == 12


async def test_any_division_into_batches_leaves_what_one_by_one_leaves(lonely_url: str) -> None:
    """The same operations of a few wallets of one shard: alone, and mixed, in whatever batches come about."""
    async with ledger_on(lonely_url) as ledger:
        outcomes: list[list[list[tuple[int, ...]]]] = []
        for at_once in (1, 7, 1_000):
            rng = random.Random(17)
            wallets = [UUID(int=uuid4().int & ~0xFF) for _ in range(3)]
            for org_id in wallets:
                await ledger.writer.submit(grant(org_id, SIGNUP_NANO))
            parts: list[dict[UUID, list[Operation]]] = [{}, {}]
            for org_id in wallets:
                holds = [place(org_id, rng.randint(1, 60), user_id=None) for _ in range(25)]
                parts[0][org_id] = list(holds)
                parts[1][org_id] = [settle(org_id, hold.hold_id, rng.randint(0, 70)) for hold in holds]
            figures: dict[UUID, list[tuple[int, ...]]] = {org_id: [] for org_id in wallets}
            for part in parts:
                turns = [org_id for org_id in wallets for _ in part[org_id]]
                random.Random(at_once).shuffle(turns)
                operations = [part[org_id].pop(0) for org_id in turns]
                for start in range(0, len(operations), at_once):
                    batch = operations[start : start + at_once]
                    answers = await asyncio.gather(*(ledger.writer.submit(op) for op in batch), return_exceptions=True)
                    for operation, answer in zip(batch, answers, strict=True):
                        figures[operation.wallet_id].append(figure(answer))
            for org_id in wallets:
                wallet = await ledger.wallet(org_id)
                figures[org_id].append((wallet.balance, wallet.held, wallet.spent, wallet.receivable))
            outcomes.append(list(figures.values()))
        assert outcomes[0] == outcomes[1] == outcomes[2]
        await ledger.verified()


def figure(answer: Any) -> tuple[int, ...]:
    if isinstance(answer, TollgateError):
        return (answer.status,)
    if isinstance(answer, Held):
        return answer.amount, answer.available
    assert isinstance(answer, Settled), answer
    return answer.cost, answer.settled, answer.receivable, answer.available
