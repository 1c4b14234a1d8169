"""A batch that PostgreSQL is writing, held up by a lock: what comes meanwhile, and when the one before is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from services.billing.ledger import failpoints
from services.billing.ledger.results import Held, Settled
from services.billing.repository.leadership import shard_of
from tests.billing.harness import SHARDS, Ledger, owner, place, settle, wait_until
from tests.billing.test_ahead import Foreseen, watched

LOOKS_FOR_S = 3  # a look waits this long for a lock, and longer


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Foreseen]:
    yield watched(monkeypatch)
    failpoints.disarm()


@asynccontextmanager
async def locked(ledger: Ledger, table: str, row: object) -> AsyncIterator[Any]:
    """A row that somebody else keeps locked, until the end of the block or a COMMIT."""
    connection = await owner(ledger.owner_url)
    try:
        await connection.execute("BEGIN")
        await connection.fetch(f"SELECT FROM billing.{table} WHERE id = $1 FOR UPDATE", row)
        yield connection
    finally:
        await connection.close()


async def blocked(ledger: Ledger, sessions: int) -> bool:
    """Whether so many wait for a lock that another has."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    found: int = await ledger.pool.fetchval(f"{waiting} AND cardinality(pg_blocking_pids(pid)) > 0")
    return found == sessions


async def decided(foreseen: Foreseen, counts: list[int]) -> bool:
    return foreseen.decided == counts


async def test_what_comes_while_a_batch_is_being_written_is_decided_as_it_comes(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    held = await ledger.held(org_id, 100)
    async with locked(ledger, "wallet", org_id) as lock:
        answers = [ledger.writer.enqueue(settle(org_id, held.hold_id, 60))]
        await wait_until(lambda: blocked(ledger, 1), "the first one's write")
        for counts in ([1], [1, 2]):
            answers.append(ledger.writer.enqueue(place(org_id, 10)))
            await wait_until(partial(decided, foreseen, counts), "a decision ahead")
        await lock.execute("COMMIT")
        await asyncio.gather(*answers)
    assert foreseen.taken_back == 0
    assert (await ledger.wallet(org_id)).held == 20
    await ledger.verified()


async def test_an_answer_does_not_wait_for_a_next_batch_that_cannot_begin(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    held, shard = await ledger.held(org_id, 100), shard_of(org_id, SHARDS)
    async with AsyncExitStack() as stack:
        lock = await stack.enter_async_context(locked(ledger, "wallet", org_id))
        first = ledger.writer.enqueue(settle(org_id, held.hold_id, 60))
        await wait_until(lambda: blocked(ledger, 1), "the first one's write")
        barring = asyncio.create_task(stack.enter_async_context(locked(ledger, "shard", shard)))
        await wait_until(lambda: blocked(ledger, 2), "who keeps the next batch from its look")
        second = ledger.writer.enqueue(place(org_id, 10))
        await wait_until(partial(decided, foreseen, [1]), "a decision ahead")
        await lock.execute("COMMIT")
        async with asyncio.timeout(LOOKS_FOR_S):
            assert isinstance(await first, Settled)
        assert not second.done()
        await (await barring).execute("COMMIT")
        assert isinstance(await second, Held)
    assert foreseen.taken_back == 0
    await ledger.verified()
