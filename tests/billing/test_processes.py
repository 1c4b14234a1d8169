"""The ledger as processes: two of them on one database, and one that kills itself at each of its failpoints."""

from __future__ import annotations

import asyncio
import random
import subprocess
from contextlib import ExitStack
from functools import partial
from uuid import UUID, uuid4

import pytest

from deploy.local.ports import pick_port
from services.billing.ledger.failpoints import FAILPOINTS, Failpoint
from shared.errors import PaymentRequired, TollgateError
from shared.grpc import Caller
from shared.metering import Hold, Metering, MeteringLimits, Usage
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from tests.billing.harness import (
    MODEL,
    SHARDS,
    Ledger,
    caller,
    grant,
    ledger_on,
    person,
    service_process,
    wait_until,
)

HOLDERS = 500
EXACTLY = 123
PRICE = 100
CREDITS = 10**9
CUSTOMERS = 8
REQUESTS_EACH = 4
PATIENT = MeteringLimits(
    hold_ttl_ms=600_000,
    call_timeout_s=5,
    hold_timeout_s=90,
    settle_wait_s=90,
    resolution_timeout_s=90,
    backoff_max_s=0.5,
)
# One before COMMIT and one between two leaders; test_torture.py has one after it.
SHORT: tuple[Failpoint, ...] = ("batch_written", "shard_locked")


async def test_of_500_holders_at_two_processes_exactly_as_many_succeed_as_there_are_credits_for(
    lonely_url: str, org_id: UUID
) -> None:
    async with ledger_on(lonely_url) as ledger:
        await ledger.writer.submit(grant(org_id, EXACTLY * PRICE + PRICE - 1))
    ports = [pick_port() for _ in range(2)]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(service_process(lonely_url, pick_port(), port))
        callers = [caller(f"127.0.0.1:{port}") for port in ports]
        clients = [Metering(each, limits=PATIENT) for each in callers]
        for client in clients:
            await wait_until(partial(answers, client), "the process's start")
        await wait_until(lambda: both_lead(callers), "a shard for each process")

        async def hold(client: Metering) -> Hold | None:
            try:
                return await client.hold(
                    person(org_id), model=MODEL, input_tokens=0, max_output_tokens=PRICE
                ).__aenter__()
            except PaymentRequired:
                return None

        holds = await asyncio.gather(*(hold(clients[n % 2]) for n in range(HOLDERS)))
        assert sum(hold is not None for hold in holds) == EXACTLY
        await asyncio.gather(*(hold.void("done") for hold in holds if hold is not None))
        for client, chat in zip(clients, callers, strict=True):
            await client.close()
            await chat.close()
    async with ledger_on(lonely_url) as ledger:
        wallet = await ledger.wallet(org_id)
        assert (wallet.held, wallet.spent, wallet.available) == (0, 0, EXACTLY * PRICE + PRICE - 1)
        await ledger.verified()


async def answers(client: Metering) -> bool:
    try:
        await client.prices()
    except TollgateError:
        return False
    return True


async def both_lead(callers: list[Caller]) -> bool:
    reply = await callers[0].call(LedgerStub(callers[0].channel).ListLeaders, pb.ListLeadersRequest())
    return len(set(reply.addresses)) == SHARDS and all(reply.addresses)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "failpoint",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.torture) for name in FAILPOINTS],
)
async def test_kill_9_at_a_failpoint_leaves_every_operation_applied_once(lonely_url: str, failpoint: Failpoint) -> None:
    wallets = [uuid4() for _ in range(CUSTOMERS)]
    async with ledger_on(lonely_url) as ledger:
        for org_id in wallets:
            await ledger.writer.submit(grant(org_id, CREDITS))
    rng, port, http_port = random.Random(failpoint), pick_port(), pick_port()
    chat = caller(f"127.0.0.1:{port}")
    client = Metering(chat, limits=PATIENT)
    # A point of leadership is reached once a shard; a batch's many times.
    times = rng.randint(4, 12) if failpoint.startswith("batch") else rng.randint(1, SHARDS)
    program = ("tests.billing.failing_service", failpoint, str(times))
    with service_process(lonely_url, http_port, port, program=program) as process:
        load = [asyncio.create_task(customer(client, org_id, random.Random(org_id.int))) for org_id in wallets]
        if failpoint == "shard_released":
            await wait_until(lambda: some_done(load), "the load")
            process.terminate()
        await wait_until(partial(has_ended, process), f"the death at {failpoint}")
        assert process.returncode == -9
    with service_process(lonely_url, http_port, port):
        produced = await asyncio.gather(*load)
        await client.close(timeout_s=60)
    await chat.close()
    async with ledger_on(lonely_url) as ledger:
        for org_id, tokens in zip(wallets, produced, strict=True):
            wallet = await ledger.wallet(org_id)
            assert (wallet.spent, wallet.held) == (tokens, 0)
        assert await once_each(ledger)
        await ledger.verified()


async def customer(client: Metering, org_id: UUID, rng: random.Random) -> int:
    """A few requests, one after the other, each of which is paid whatever dies meanwhile. The tokens produced."""
    produced = 0
    for _ in range(REQUESTS_EACH):
        tokens = rng.randint(1, 50)
        async with client.hold(person(org_id), model=MODEL, input_tokens=0, max_output_tokens=50) as hold:
            receipt = await hold.settle(build="b", finish_reason="stop", usage=Usage(0, 0, tokens))
            assert receipt is not None
            assert receipt.cost_nano == tokens
        produced += tokens
    return produced


async def some_done(tasks: list[asyncio.Task[int]]) -> bool:
    return any(task.done() for task in tasks)


async def has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


async def once_each(ledger: Ledger) -> bool:
    """Holds that nobody heard of may be there, voided; settlements are as many as the requests."""
    settled: int = await ledger.pool.fetchval("SELECT count(*) FROM billing.op WHERE kind = 'settle'")
    return settled == CUSTOMERS * REQUESTS_EACH
