"""What runs beside the requests."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

from services.billing.domain import NANO_PER_CREDIT
from services.billing.tasks import Gauges
from tests.billing.harness import App, Ledger, settle, wait_until


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
        await ledger.writer.apply(settle(org_id, first.hold_id, 300))
        await wait_until(lambda: shows(1, 400), "the gauges after a settlement")
        await ledger.writer.apply(settle(org_id, second.hold_id, 0))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_sweeper_sweeps_by_itself(app: App, ledger: Ledger) -> None:
    wallets = [uuid4() for _ in range(5)]
    for org_id in wallets:
        await ledger.held(org_id, 100, ttl_ms=100)
    sweeping = asyncio.create_task(app.tasks["sweeper"]())
    try:

        async def released() -> bool:
            return all([(await ledger.wallet(org_id)).held == 0 for org_id in wallets])

        await wait_until(released, "the release")
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
    assert "tollgate_billing_holds_expired_total 5.0" in (await app.http.get("/metrics")).text


async def test_operations_are_counted_by_result(ledger: Ledger, org_id: UUID) -> None:
    def count(kind: str, result: str) -> float:
        return float(ledger.metrics.operations.labels(kind, result)._value.get())

    before = count("settle", "applied"), count("settle", "replayed")
    held = await ledger.held(org_id, 10)
    for _ in range(3):
        await ledger.writer.apply(settle(org_id, held.hold_id, 4))
    assert (count("settle", "applied"), count("settle", "replayed")) == (before[0] + 1, before[1] + 2)
