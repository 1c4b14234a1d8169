"""Operations at random through one writer that decides ahead, with faults at every point of its transactions, beside
the naive model: each answer is the one that the model gives to the operations one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from services.billing.ledger import failpoints
from services.billing.ledger.batch import Fenced
from services.billing.ledger.failpoints import Failpoint
from services.billing.ledger.operations import (
    AuthoredOperation,
    ExpireHold,
    ExtendHold,
    GrantCredits,
    Heartbeat,
    Operation,
)
from services.billing.ledger.results import Result
from services.billing.ledger.writer import ShardWriter, WriterLimits
from services.billing.repository import leadership
from services.billing.repository.leadership import shard_of
from services.billing.repository.ledger_write import BookOutdated
from shared.errors import TollgateError
from tests.billing.harness import DEADLINE_S, SHARDS, TERMS, Ledger, accepts, session, wait_until, writer_beside
from tests.billing.side_by_side import Pair, figures, grant, pair, random_operation
from tests.billing.test_ahead import Foreseen, watched

WALLETS = 3
OPERATIONS = 60
BURST_MAX = 15
POINTS: tuple[Failpoint, ...] = ("batch_read", "batch_decided", "batch_written", "batch_committed")
FAULTS: tuple[Exception, ...] = (asyncpg.ConnectionDoesNotExistError("test"), BookOutdated(), Fenced())
FAULT_SHARE = 0.05
LIMITS = WriterLimits(operation_timeout_s=DEADLINE_S, batch_operations_max=4, attempts_max=1_000)
Answer = tuple[int, ...] | str


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Foreseen]:
    yield watched(monkeypatch)
    failpoints.disarm()


class Wallet:
    """Operations that make sense one after the other, with what the model answers to each."""

    def __init__(self, wallet_id: UUID, rng: random.Random) -> None:
        self.wallet_id = wallet_id
        self.state = pair(TERMS)
        self.story: list[tuple[Operation, Answer]] = []
        self._keys: set[str] = set()
        self._add(grant(5_000))
        for _ in range(OPERATIONS):
            self._add(random_operation(rng, self.state))

    def _add(self, operation: Operation) -> None:
        """Without what depends on the time, and without repetitions, which have tests of their own."""
        if isinstance(operation, GrantCredits):
            operation = replace(operation, expires_at=None)
        elif isinstance(operation, ExtendHold):  # who asks again counts on
            operation = replace(operation, number=len(self.story))
        keys = set(operation.keys) if operation.remembered else set()
        if isinstance(operation, ExpireHold) or keys & self._keys:
            return
        answer = _answered(self.state, operation)
        if answer == "nothing_to_refund":  # not remembered: sent again, it may find what was taken meanwhile
            return
        self._keys |= keys
        operation = replace(operation, wallet_id=self.wallet_id)
        if isinstance(operation, AuthoredOperation):
            operation = replace(operation, idempotency_tenant=self.wallet_id)
        self.story.append((operation, answer))


def _answered(state: Pair, operation: Operation) -> Answer:
    outcome = state.both(operation)
    return outcome if isinstance(outcome, str) else figures(outcome)


async def led(writer: ShardWriter, ledger: Ledger, until: asyncio.Event) -> None:
    """One term after the other, as the shards do it."""
    while not until.is_set():
        async with session(ledger) as connection:
            epoch = await leadership.raise_epoch(connection, writer.shard, SHARDS, "")
            with contextlib.suppress(asyncpg.PostgresConnectionError, Fenced):
                await writer.serve(connection, epoch, until)


async def through(writer: ShardWriter, wallets: list[Wallet], rng: random.Random) -> None:
    """All stories mixed, in bursts, and their answers compared."""
    turns = [wallet for wallet in wallets for _ in wallet.story]
    rng.shuffle(turns)
    stories = {wallet.wallet_id: iter(wallet.story) for wallet in wallets}
    sent: list[tuple[Operation, Answer, asyncio.Future[Result]]] = []
    for wallet in turns:
        operation, expected = next(stories[wallet.wallet_id])
        sent.append((operation, expected, writer.enqueue(operation)))
        if rng.random() < 1 / BURST_MAX:
            await asyncio.wait([rng.choice(sent)[2]])
    answers = await asyncio.gather(*(answer for _, _, answer in sent), return_exceptions=True)
    for (operation, expected, _), answer in zip(sent, answers, strict=True):
        if isinstance(operation, Heartbeat):  # not remembered: sent again, it may find its hold resolved
            continue
        assert not isinstance(answer, BaseException) or isinstance(answer, TollgateError), answer
        actual = answer.code if isinstance(answer, TollgateError) else figures(answer)
        assert actual == expected, (operation, actual, expected)


async def story(ledger: Ledger, seed: int) -> None:
    rng = random.Random(seed)
    shard = rng.randrange(SHARDS)
    ids = (uuid4() for _ in iter(int, 1))
    wallets = [Wallet(next(i for i in ids if shard_of(i, SHARDS) == shard), rng) for _ in range(WALLETS)]
    writer = writer_beside(ledger, shard, LIMITS)

    def perhaps() -> None:
        if rng.random() < FAULT_SHARE:
            raise rng.choice(FAULTS)

    until = asyncio.Event()
    serving = asyncio.create_task(led(writer, ledger, until))
    try:
        await wait_until(lambda: accepts(writer), "the writer")
        for point in POINTS:
            failpoints.arm(point, perhaps)
        await through(writer, wallets, rng)
    finally:
        failpoints.disarm()
        until.set()
        await serving
    for wallet in wallets:
        view, oracle = await ledger.wallet(wallet.wallet_id), wallet.state.oracle
        held = sum(request.amount for request in oracle.open.values())
        assert (view.available, view.receivable) == (oracle.available(wallet.state.now), oracle.owed)
        assert (view.spent, view.held) == (oracle.spent, held)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_fails_answers_are_those_of_the_model_one_by_one(
    ledger: Ledger, foreseen: Foreseen, seed: int
) -> None:
    await story(ledger, seed)
    assert sum(foreseen.decided) > 0
    await ledger.verified()


@pytest.mark.torture
@pytest.mark.timeout(3_600)
async def test_hundreds_of_stories_are_answered_as_the_model_does(ledger: Ledger, foreseen: Foreseen) -> None:
    for seed in range(1_000, 1_300):
        await story(ledger, seed)
    assert foreseen.taken_back > 0
    await ledger.verified()
