"""What runs beside the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from services.billing.errors import LedgerUnavailable
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from services.billing.ledger.writer import WriterLimits
from services.billing.tasks import Gauges, Sweeper
from shared.money import NANO_PER_CREDIT
from tests.billing.gate import Gate, gate_to
from tests.billing.harness import (
    SHARDS,
    SIGNUP_NANO,
    App,
    EveryShard,
    Ledger,
    grant,
    heartbeat,
    ledger_on,
    settle,
    wait_until,
)


def gauge(ledger: Ledger, name: str) -> float:
    return float(getattr(ledger.metrics, name)._value.get())


async def test_the_gauges_show_what_is_open_held_and_frozen(ledger: Ledger, org_id: UUID) -> None:
    gauges = Gauges(ledger.database, ledger.metrics, interval_s=0.02)
    running = asyncio.create_task(gauges.run())
    try:
        first, second = await ledger.held(org_id, 300), await ledger.held(org_id, 400)
        await ledger.pool.execute("UPDATE billing.wallet SET frozen_at = now() WHERE id = $1", org_id)

        async def shows(holds: int, held: int) -> bool:
            figures = [gauge(ledger, n) for n in ("open_holds", "credits_held", "wallets_frozen")]
            return figures == [holds, held / NANO_PER_CREDIT, 1]

        await wait_until(lambda: shows(2, 700), "the gauges")
        await ledger.writer.submit(settle(org_id, first.hold_id, 300))
        await wait_until(lambda: shows(1, 400), "the gauges after a settlement")
        await ledger.writer.submit(settle(org_id, second.hold_id, 0))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_sweeper_sweeps_by_itself(app: App, ledger: Ledger) -> None:
    async def shared() -> bool:
        return 0 < len(ledger.writer.led) < SHARDS

    await wait_until(shared, "a shard for each process")
    wallets = [org_id for org_id in (uuid4() for _ in range(50)) if not ledger.writer.writer_of(org_id).accepts][:5]
    for org_id in wallets:
        await ledger.held(org_id, 100, ttl_ms=100)
    sweeping = asyncio.create_task(app.tasks["sweeper"]())
    try:

        async def released() -> bool:
            return all([(await ledger.wallet(org_id)).held == 0 for org_id in wallets])

        async def counted() -> bool:
            return "tollgate_billing_holds_expired_total 5.0" in (await app.http.get("/metrics")).text

        await wait_until(released, "the release")
        await wait_until(counted, "the count")
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)


async def test_operations_are_counted_by_result(lonely_url: str, org_id: UUID) -> None:
    async with ledger_on(lonely_url) as ledger:
        held = await ledger.held(org_id, 10)
        for _ in range(3):
            await ledger.writer.submit(settle(org_id, held.hold_id, 4))
        counts = [ledger.metrics.operations.labels("settle", result)._value.get() for result in ("applied", "replayed")]
    assert counts == [1, 2]


@asynccontextmanager
async def behind_a_gate(ledger: Ledger) -> AsyncIterator[tuple[Ledger, Gate]]:
    """The same database by way of a gate."""
    parts = urlsplit(ledger.url)
    assert parts.hostname is not None
    assert parts.port is not None
    async with gate_to(parts.hostname, parts.port) as gate:
        url = urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{gate.port}"))
        async with ledger_on(ledger.owner_url, url=url) as behind:
            yield behind, gate


async def test_after_an_outage_live_requests_may_report_before_their_holds_expire(ledger: Ledger, org_id: UUID) -> None:
    """An outage longer than the lives of two holds: one request goes on afterwards, the other one's process is dead."""
    async with behind_a_gate(ledger) as (behind, gate):
        sweeper = Sweeper(
            behind.database, EveryShard(behind.writer), behind.metrics, interval_s=1, batch_max=100, hold_grace_s=1
        )
        await sweeper.sweep()
        live, dead = await ledger.held(org_id, 300), await ledger.held(org_id, 400)
        gate.shut()
        with pytest.raises(LedgerUnavailable):
            await sweeper.sweep()
        for hold in (live, dead):
            await ledger.expire_now(hold.hold_id)
        gate.open()
        assert await sweeper.sweep() == 0
        assert (await ledger.wallet(org_id)).held == 700
        await ledger.writer.submit(heartbeat(org_id, live.hold_id, 20))

        async def swept() -> bool:
            await sweeper.sweep()
            return (await ledger.wallet(org_id)).held == 300

        await wait_until(swept, "the expiry of the dead one")
    await ledger.writer.submit(settle(org_id, live.hold_id, 300))


@dataclass
class Interrupted:
    """The ledger, whose database goes away when it is first asked for anything."""

    ledger: Ledger
    gate: Gate

    @property
    def count(self) -> int:
        return self.ledger.writer.count

    @property
    def led(self) -> list[int]:
        return self.ledger.writer.led

    async def submit(self, operation: Operation) -> Result:
        self.gate.shut()
        return await self.ledger.writer.submit(operation)


async def test_an_outage_in_the_middle_of_a_pass_ends_it(lonely_url: str) -> None:
    async with ledger_on(lonely_url) as plain, behind_a_gate(plain) as (behind, gate):

        async def shared() -> bool:
            return 0 < len(behind.writer.led) < SHARDS

        await wait_until(shared, "a shard for each process")
        org_id = next(wallet for wallet in iter(uuid4, None) if behind.writer.writer_of(wallet).accepts)
        interrupted = Interrupted(behind, gate)
        sweeper = Sweeper(behind.database, interrupted, behind.metrics, interval_s=1, batch_max=100, hold_grace_s=0.1)
        holds = [await plain.held(org_id, 100) for _ in range(10)]
        for hold in holds:
            await plain.expire_now(hold.hold_id)

        async def broke() -> bool:
            try:
                await sweeper.sweep()
            except (OSError, asyncpg.PostgresConnectionError):
                return True
            return False

        await wait_until(broke, "the outage")
        gate.open()
        assert await sweeper.sweep() == 0
        await plain.sweeper.sweep()
        assert (await plain.wallet(org_id)).held == 0


async def test_no_hold_expires_at_once_after_a_start_but_grants_do(ledger: Ledger, org_id: UUID) -> None:
    everywhere = EveryShard(ledger.writer)
    sweeper = Sweeper(ledger.database, everywhere, ledger.metrics, interval_s=1, batch_max=100, hold_grace_s=3_600)
    held = await ledger.held(org_id, 300)
    await ledger.expire_now(held.hold_id)
    credit = grant(org_id, 5, expires_at=datetime.now(UTC) + timedelta(hours=1))
    await ledger.writer.submit(credit)
    await ledger.lapse_now(credit.account_id)

    async def lapsed() -> bool:
        await sweeper.sweep()
        return (await ledger.wallet(org_id)).balance == SIGNUP_NANO

    await wait_until(lapsed, "the end of the grant")
    assert (await ledger.wallet(org_id)).held == 300
    await ledger.writer.submit(settle(org_id, held.hold_id, 0))


async def test_a_shard_that_is_stuck_does_not_keep_the_others_from_expiring(lonely_url: str) -> None:
    stuck = uuid4()
    other = UUID(int=uuid4().int & ~0xFF | (stuck.int + 1) % 256)
    async with ledger_on(lonely_url) as patient:
        for org_id in (stuck, other):
            held = await patient.held(org_id, 100)
            await patient.expire_now(held.hold_id)
    async with ledger_on(lonely_url, limits=WriterLimits(operation_timeout_s=0.5)) as hasty:

        async def released(org_id: UUID) -> bool:
            await hasty.sweeper.sweep()
            return (await hasty.wallet(org_id)).held == 0

        async with hasty.stalled(stuck):
            await wait_until(lambda: released(other), "the release of the other")
            assert (await hasty.wallet(stuck)).held == 100
        await wait_until(lambda: released(stuck), "the release")
