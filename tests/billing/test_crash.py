"""Nothing is lost and nothing is taken twice when processes and connections die under load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import pytest

from deploy.local.ports import pick_port
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Held, Result, Settled
from shared.errors import TollgateError
from shared.metering import Metering, MeteringLimits, Usage
from tests.billing.gate import Gate, gate_to
from tests.billing.harness import (
    MODEL,
    ROLE,
    SIGNUP_NANO,
    Ledger,
    caller,
    grant,
    ledger_on,
    person,
    place,
    service_process,
    settle,
    wait_until,
)
from tests.conftest import Components, role_url

WORKERS = 12
KILLS = 2
REQUESTS_BETWEEN_KILLS = 50
CREDITS = 10**9


async def answers(grpc_port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", grpc_port)
    except OSError:
        return False
    writer.close()
    return True


class Load:
    """Workers that hold, produce and settle without end, and know what they were told it cost."""

    def __init__(self, metering: Metering, org_id: UUID) -> None:
        self._metering = metering
        self._identity = person(org_id)
        self.settled = 0
        self.produced = 0
        self.stopping = asyncio.Event()

    async def progress(self, requests: int) -> None:
        """Wait for so many more."""
        goal = self.settled + requests

        async def reached() -> bool:
            return self.settled >= goal

        await wait_until(reached, f"{requests} requests")

    async def worker(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stopping.is_set():
            tokens = rng.randint(1, 50)
            try:
                async with self._metering.hold(
                    self._identity, model=MODEL, input_tokens=0, max_output_tokens=50
                ) as hold:
                    hold.record(Usage(output_tokens=tokens))
                    # From here on the tokens are produced, and must be paid once whatever happens.
                    self.produced += tokens
                    await hold.settle(build="b", finish_reason="stop")
                    self.settled += 1
            except TollgateError as e:
                if e.code != "billing_unavailable":
                    raise
                await asyncio.sleep(0.05)


@pytest.mark.timeout(600)
async def test_kill_9_of_the_service_under_load_neither_loses_nor_doubles_a_credit(owner_url: str) -> None:
    org_id, http_port, grpc_port = uuid4(), pick_port(), pick_port()
    chat = caller(f"127.0.0.1:{grpc_port}")
    limits = MeteringLimits(hold_ttl_ms=60_000, settle_wait_s=60, call_timeout_s=2)
    metering = Metering(chat, limits=limits)
    load = Load(metering, org_id)
    async with ledger_on(owner_url) as ledger:
        await ledger.writer.submit(grant(org_id, CREDITS))
        workers: list[asyncio.Task[None]] = []
        for kill in range(KILLS + 1):
            with service_process(owner_url, http_port, grpc_port) as process:
                await wait_until(lambda: answers(grpc_port), "the service's start")
                workers = workers or [asyncio.create_task(load.worker(n)) for n in range(WORKERS)]
                await load.progress(REQUESTS_BETWEEN_KILLS)
                if kill < KILLS:
                    process.kill()
                    process.wait()
                else:
                    load.stopping.set()
                    await asyncio.gather(*workers)
                    await metering.close(timeout_s=60)
        wallet = await ledger.wallet(org_id)
        assert wallet.spent == load.produced
        assert wallet.receivable == 0
        report = await ledger.verified()
        assert report.holds >= load.settled
    await chat.close()


@asynccontextmanager
async def through_a_gate(owner_url: str) -> AsyncIterator[tuple[Ledger, Gate]]:
    """A ledger, and the gate on its way to PostgreSQL."""
    parts = urlsplit(role_url(owner_url, ROLE))
    assert parts.hostname is not None
    assert parts.port is not None
    async with gate_to(parts.hostname, parts.port) as gate:
        url = urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{gate.port}"))
        async with ledger_on(owner_url, url=url) as ledger:
            yield ledger, gate


async def test_a_commit_whose_acknowledgement_is_lost_is_applied_once(lonely_url: str, org_id: UUID) -> None:
    async with through_a_gate(lonely_url) as (ledger, gate):
        gate.lose_answer(b"COMMIT")
        held = await ledger.held(org_id, 100)
        gate.lose_answer(b"COMMIT")
        settled = await ledger.writer.submit(settle(org_id, held.hold_id, 60))
        assert isinstance(settled, Settled)
        assert gate.lost == 2
        wallet = await ledger.wallet(org_id)
        assert (wallet.granted, wallet.spent, wallet.held) == (SIGNUP_NANO, 60, 0)
        operations = "SELECT count(*) FROM billing.op WHERE tenant = $1"
        assert await ledger.pool.fetchval(operations, org_id) == 2
        await ledger.verified()


async def test_a_database_that_goes_away_and_comes_back_costs_only_time(lonely_url: str, org_id: UUID) -> None:
    async with through_a_gate(lonely_url) as (ledger, gate):
        first = await ledger.held(org_id, 100)
        gate.shut()
        with pytest.raises(TollgateError) as refused:
            await ledger.writer.submit(place(org_id, 100))
        assert (refused.value.status, refused.value.code) == (503, "billing_unavailable")
        gate.open()
        assert isinstance(await ledger.writer.submit(settle(org_id, first.hold_id, 5)), Settled)
        assert (await ledger.wallet(org_id)).held == 0
        await ledger.verified()


async def test_connections_that_are_cut_at_random_leave_every_operation_applied_once(
    ledger: Ledger, components: Components
) -> None:
    rng = random.Random(5)
    spent: dict[UUID, int] = {}
    done, progress = asyncio.Event(), asyncio.Event()

    async def cut() -> None:
        while not done.is_set():
            await asyncio.to_thread(
                components.postgres.execute,
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}' AND random() < 0.5",
            )
            progress.clear()
            if not done.is_set():  # on a slow machine nothing would ever get through without a pause
                await progress.wait()

    async def customer(org_id: UUID) -> None:
        for _ in range(8):
            operation, tokens = place(org_id, 20), rng.randint(1, 20)
            held = await stubborn(ledger, operation)
            progress.set()
            assert isinstance(held, Held)
            await stubborn(ledger, settle(org_id, held.hold_id, tokens))
            spent[org_id] = spent.get(org_id, 0) + tokens
            progress.set()

    cutting = asyncio.create_task(cut())
    await asyncio.gather(*(customer(uuid4()) for _ in range(6)))
    done.set()
    progress.set()
    await cutting
    for org_id, tokens in spent.items():
        wallet = await ledger.wallet(org_id)
        assert (wallet.spent, wallet.held) == (tokens, 0)
    await ledger.verified()


async def stubborn(ledger: Ledger, operation: Operation) -> Result:
    """As a client: the same operation again until it is answered."""
    while True:
        try:
            return await ledger.writer.submit(operation)
        except TollgateError as e:
            if e.code != "billing_unavailable":
                raise
