"""kill -9 of billing and of PostgreSQL, at random and at every failpoint, under operations at random; then `verify`."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from services.billing.ledger.failpoints import FAILPOINTS, Failpoint
from tests.billing.torture import WORKERS, Customers, check, customers_of
from tests.billing.trap import WIRE_POINTS, WIRE_POINTS_IN_SHORT, Victim, WirePoint
from tests.billing.victims import PROCESSES, Victims
from tests.conftest import STATE_PREFIX

MINUTES = float(os.environ.get("TOLLGATE_TORTURE_MINUTES", "30"))
WALLETS = 12
REQUESTS_BETWEEN = 20
SETTLING_S = 600
FAILPOINTS_IN_SHORT: tuple[Failpoint, ...] = ("batch_committed",)
VICTIMS: tuple[Victim, ...] = ("billing", "postgres")


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"{STATE_PREFIX}torture-") as directory:
        Path(directory).chmod(0o755)  # PostgreSQL's own user passes through
        yield Path(directory) / "state"


async def through(
    victims: Victims,
    customers: Customers,
    wire: Sequence[WirePoint],
    failpoints: Sequence[Failpoint],
    rng: random.Random,
) -> None:
    """Every point in turn, each in one process or the other, with work in between."""
    for number, point in enumerate(wire):
        await customers.progress(REQUESTS_BETWEEN)
        await victims.spring(point, number % PROCESSES)
    for number, name in enumerate(failpoints):
        await customers.progress(REQUESTS_BETWEEN)
        times = rng.randint(1, 20) if name.startswith("batch_") else 1
        await victims.die_at(name, number % PROCESSES, times)


async def at_random(victims: Victims, customers: Customers, rng: random.Random, until_s: float) -> None:
    """Kill somebody now and then."""
    while time.monotonic() < until_s:
        await asyncio.sleep(rng.uniform(0, 3))
        victims.kill(rng.randrange(PROCESSES), rng.choice(VICTIMS))
        await victims.recovered()
        await customers.progress(REQUESTS_BETWEEN)


async def torture(state: Path, wire: Sequence[WirePoint], failpoints: Sequence[Failpoint], minutes: float) -> Customers:
    """All points at least once, then at random until the time is over; then the books are checked."""
    victims, rng = Victims(state), random.Random(20_261_121)
    until_s = time.monotonic() + minutes * 60
    async with victims.running(), customers_of(victims, [uuid4() for _ in range(WALLETS)]) as customers:
        async with asyncio.TaskGroup() as group:
            for seed in range(WORKERS):
                group.create_task(customers.worker(seed))
            await through(victims, customers, wire, failpoints, rng)
            while time.monotonic() < until_s:
                await at_random(victims, customers, rng, min(until_s, time.monotonic() + 60))
                await through(victims, customers, rng.sample(wire, 2), rng.sample(failpoints, 2), rng)
            await customers.progress(REQUESTS_BETWEEN)
            customers.stopping.set()
        await check(victims, customers)
    return customers


@pytest.mark.timeout(600)
async def test_a_process_and_a_database_that_die_in_mid_transaction_cost_nobody_a_credit(state: Path) -> None:
    customers = await torture(state, WIRE_POINTS_IN_SHORT, FAILPOINTS_IN_SHORT, 0)
    assert customers.done > REQUESTS_BETWEEN * 2


@pytest.mark.torture
@pytest.mark.timeout(MINUTES * 60 * 2 + SETTLING_S)
async def test_nothing_that_dies_anywhere_costs_anybody_a_credit(state: Path) -> None:
    customers = await torture(state, WIRE_POINTS, FAILPOINTS, MINUTES)
    assert customers.refused > 0
