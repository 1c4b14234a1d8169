"""The next batch is decided while one is being written; what becomes of it when that one fails, or the world moves on.

Everything happens at failpoints: the first operation's transaction is at the point while the second waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest

from services.billing.errors import CreditsReserved, HoldResolved, LedgerUnavailable, WalletFrozen
from services.billing.ledger import failpoints
from services.billing.ledger.batch import Batch, Pending
from services.billing.ledger.failpoints import Failpoint
from services.billing.ledger.operations import ExtendHold, Freeze, Operation, Refund
from services.billing.ledger.results import Held, Refunded, Result, Settled
from services.billing.ledger.writer import NotLeading
from services.billing.repository.leadership import shard_of
from tests.billing.harness import (
    SHARDS,
    SIGNUP_NANO,
    Ledger,
    accepts,
    grant,
    heartbeat,
    ledger_on,
    place,
    session,
    settle,
    wait_until,
    writer_beside,
)
from tests.billing.test_crash import through_a_gate
from tests.billing.test_writer import epoch_of, operations_of
from tests.conftest import Components

WRITERS = "FROM pg_stat_activity WHERE application_name = 'tollgate-billing-writer'"


class Foreseen:
    """How many operations each look ahead has decided, and how often that was taken back."""

    def __init__(self) -> None:
        self.decided: list[int] = []
        self.taken_back = 0


def watched(monkeypatch: pytest.MonkeyPatch) -> Foreseen:
    """From now on, of every batch."""
    found, decide_ahead, take_back = Foreseen(), Batch.decide_ahead, Batch.take_back

    def decided(self: Batch, pendings: Sequence[Pending]) -> None:
        decide_ahead(self, pendings)
        found.decided.append(sum(pending.outcome != "" for pending in self.pendings))

    def counted(self: Batch) -> None:
        found.taken_back += 1
        take_back(self)

    monkeypatch.setattr(Batch, "decide_ahead", decided)
    monkeypatch.setattr(Batch, "take_back", counted)
    return found


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Foreseen]:
    yield watched(monkeypatch)
    failpoints.disarm()


def once(name: Failpoint, action: Callable[[], object]) -> None:
    """Have the action called when the point is reached for the first time."""
    done: list[bool] = []

    def act() -> None:
        if not done:
            done.append(True)
            action()

    failpoints.arm(name, act)


async def both(ledger: Ledger, first: Operation, *others: Operation) -> list[Result | BaseException]:
    """Submit the first, and the others as soon as it is decided: they are decided while it is being written."""
    answers: list[asyncio.Task[Result]] = []
    once("batch_decided", lambda: answers.extend(asyncio.create_task(ledger.writer.submit(op)) for op in others))
    answer = await asyncio.gather(ledger.writer.submit(first), return_exceptions=True)
    return [*answer, *await asyncio.gather(*answers, return_exceptions=True)]


def sql(ledger: Ledger, components: Components, statement: str) -> None:
    """As a superuser, at once: failpoints do not wait."""
    components.postgres.execute(statement, database=urlsplit(ledger.owner_url).path[1:])


async def test_what_is_decided_ahead_builds_on_what_is_being_written(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    held, other = await ledger.held(org_id, 100), await ledger.held(org_id, 50)
    operations = settle(org_id, other.hold_id, 20), place(org_id, 900), place(org_id, 50)
    answers = await both(ledger, settle(org_id, held.hold_id, 60), *operations)
    assert [getattr(answer, "available", None) for answer in answers] == [SIGNUP_NANO - 110, SIGNUP_NANO - 80, 20, None]
    assert (foreseen.decided, foreseen.taken_back) == ([3], 0)
    await ledger.verified()


async def test_nobody_has_an_answer_before_the_commit_of_it(ledger: Ledger, org_id: UUID, foreseen: Foreseen) -> None:
    held = await ledger.held(org_id, 100)
    seen: list[tuple[str, bool, bool]] = []
    first: list[asyncio.Future[Result]] = []
    second: list[asyncio.Future[Result]] = []

    def note(point: Failpoint) -> None:
        seen.append((point, first[0].done(), bool(second) and second[0].done()))

    once("batch_decided", lambda: second.append(ledger.writer.enqueue(place(org_id, 900))))
    for point in ("batch_ahead", "batch_written", "batch_committed"):
        failpoints.arm(point, partial(note, point))
    first.append(ledger.writer.enqueue(settle(org_id, held.hold_id, 60)))
    await first[0]
    await second[0]
    assert foreseen.decided == [1]
    assert seen == [
        ("batch_ahead", False, False),
        ("batch_written", False, False),
        ("batch_committed", False, False),
        ("batch_written", True, False),
        ("batch_committed", True, False),
    ]


async def test_a_hold_that_is_resolved_ahead_is_resolved_for_what_comes_before_the_commit(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    """In the database it is open still; what comes meanwhile goes into the batch that resolves it."""
    other, held = await ledger.held(org_id, 10), await ledger.held(org_id, 100)
    late: list[asyncio.Future[Result]] = []

    def comes() -> None:
        more = ExtendHold(org_id, held.hold_id, 1, 150)
        late.extend(ledger.writer.enqueue(op) for op in (more, heartbeat(org_id, held.hold_id, 90)))

    once("batch_committed", comes)
    answers = await both(ledger, settle(org_id, other.hold_id, 10), settle(org_id, held.hold_id, 60))
    assert [getattr(answer, "cost", None) for answer in answers] == [10, 60]
    for answer in late:
        with pytest.raises(HoldResolved):
            await answer
    assert (foreseen.decided, foreseen.taken_back) == ([1], 0)
    assert await ledger.pool.fetchval("SELECT count(*) FROM billing.open_hold WHERE wallet_id = $1", org_id) == 0
    wallet = await ledger.wallet(org_id)
    assert (wallet.spent, wallet.held) == (70, 0)
    await ledger.verified()


async def test_what_reads_rows_is_decided_when_those_that_were_decided_ahead_are_written(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    other, held = await ledger.held(org_id, 10), await ledger.held(org_id, 100)
    refund = Refund(org_id, org_id, f"key:{org_id}", "user:test", held.hold_id, uuid4(), None, "test")
    refunds: list[asyncio.Future[Result]] = []
    once("batch_committed", lambda: refunds.append(ledger.writer.enqueue(refund)))
    await both(ledger, settle(org_id, other.hold_id, 10), settle(org_id, held.hold_id, 60))
    assert (foreseen.decided, foreseen.taken_back) == ([1, 0], 0)
    refunded = await refunds[0]
    assert isinstance(refunded, Refunded)
    assert refunded.amount == 60
    await ledger.verified()


async def test_an_operation_that_took_too_long_is_not_in_a_batch_twice(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    """Decided ahead, its caller is told that it takes too long, and comes again: for the same one."""
    held = await ledger.held(org_id, 100)
    writer, operation = ledger.writer.writer_of(org_id), settle(org_id, held.hold_id, 60)
    answers: list[asyncio.Future[Result]] = []
    waiting: list[int] = []

    def too_late() -> None:
        answers.append(ledger.writer.enqueue(operation))  # with the first one
        assert writer._ahead is not None
        [pending] = writer._ahead.pendings
        pending.deadline_s = 0
        writer.tell_late()
        answers.append(ledger.writer.enqueue(operation))
        writer.tell_late()
        waiting.append(writer.waiting)

    once("batch_decided", lambda: answers.append(ledger.writer.enqueue(operation)))
    once("batch_ahead", too_late)
    await ledger.writer.submit(place(org_id, 50))
    for answer in answers[:2]:
        with pytest.raises(LedgerUnavailable):
            await answer
    assert isinstance(await answers[2], Settled)
    assert waiting == [2], "the hold in flight, and this"
    assert (foreseen.decided, foreseen.taken_back) == ([1], 0)
    assert await operations_of(ledger, org_id) == 3
    await ledger.verified()


async def test_what_was_refused_ahead_and_taken_back_is_answered_as_it_is_decided_then(
    ledger: Ledger, components: Components, org_id: UUID, foreseen: Foreseen
) -> None:
    """Frozen at first; released before its transaction looks."""
    held = await ledger.held(org_id, 100)
    thaw = f"UPDATE billing.wallet SET frozen_at = NULL WHERE id = '{org_id}'"
    await ledger.writer.submit(Freeze(org_id, org_id, f"key:{org_id}", "user:test", frozen=True, reason="test"))
    await ledger.writer.submit(heartbeat(org_id, held.hold_id, 1))
    once("batch_committed", lambda: sql(ledger, components, thaw))
    answers = await both(ledger, settle(org_id, held.hold_id, 60), place(org_id, 900))
    assert isinstance(answers[1], Held)
    assert (foreseen.decided, foreseen.taken_back) == ([1], 1)
    await ledger.verified()


async def test_a_batch_that_fails_takes_what_was_decided_on_it_along(
    lonely_url: str, components: Components, org_id: UUID, foreseen: Foreseen
) -> None:
    """The session ends before COMMIT: both come again, and find what was before either."""
    async with ledger_on(lonely_url) as ledger:
        held = await ledger.held(org_id, 100)
        kill = f"SELECT pg_terminate_backend(pid) {WRITERS} AND datname = current_database()"
        once("batch_written", lambda: sql(ledger, components, kill))
        answers = await both(ledger, settle(org_id, held.hold_id, 60), place(org_id, 900))
        assert [getattr(answer, "available", None) for answer in answers] == [SIGNUP_NANO - 60, 40]
        assert foreseen.decided[0] == 1
        assert await operations_of(ledger, org_id) == 3
        await ledger.verified()


async def test_a_lost_acknowledgement_with_a_batch_behind_it_applies_both_once(
    lonely_url: str, org_id: UUID, foreseen: Foreseen
) -> None:
    async with through_a_gate(lonely_url) as (ledger, gate):
        held = await ledger.held(org_id, 100)
        once("batch_written", lambda: gate.lose_answer(b"COMMIT"))
        answers = await both(ledger, settle(org_id, held.hold_id, 60), place(org_id, 900))
        assert gate.lost == 1
        assert [getattr(answer, "available", None) for answer in answers] == [SIGNUP_NANO - 60, 40]
        assert foreseen.decided[0] == 1
        assert await operations_of(ledger, org_id) == 3
        await ledger.verified()


async def test_a_writer_that_is_fenced_writes_nothing_of_what_it_decided_ahead(
    lonely_url: str, components: Components, org_id: UUID, foreseen: Foreseen
) -> None:
    """Another leads from the first one's COMMIT on, and takes the credits that the second was promised."""
    async with ledger_on(lonely_url) as ledger:
        held = await ledger.held(org_id, 100)
        shard = shard_of(org_id, SHARDS)
        taken = "UPDATE billing.account SET debits_pending = debits_pending {} 500 WHERE limited; "
        taken += "UPDATE billing.account SET credits_pending = credits_pending {} 500 WHERE kind = 'revenue'; "
        fence = f"UPDATE billing.shard SET epoch = epoch + 1 WHERE id = {shard}"
        once("batch_committed", lambda: sql(ledger, components, taken.replace("{}", "+") + fence))
        answers = await both(ledger, settle(org_id, held.hold_id, 60), place(org_id, 900))
        assert isinstance(answers[0], Settled)
        assert getattr(answers[1], "code", None) == "credits_reserved"
        assert foreseen.decided == [1]
        sql(ledger, components, taken.replace("{}", "-"))
        await ledger.verified()


async def test_a_hold_that_cannot_be_written_does_not_take_what_was_decided_on_it_along(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    """Its id is that of another wallet's hold: the batch is divided, and what was behind it is decided anew."""
    other = next(w for w in iter(uuid4, None) if shard_of(w, SHARDS) == shard_of(org_id, SHARDS))
    for wallet in (org_id, other):
        await ledger.writer.submit(grant(wallet, 100))
    taken = await ledger.held(other, 1, user_id=None)
    first = place(org_id, 80, hold_id=taken.hold_id, user_id=None)
    answers = await both(ledger, first, place(org_id, 90, user_id=None))
    assert getattr(answers[0], "status", None) == 422
    assert isinstance(answers[1], Held), "80 are not held after all"
    assert foreseen.decided[0] == 1
    await ledger.verified()


async def test_what_was_done_before_is_not_done_again_ahead(ledger: Ledger, org_id: UUID, foreseen: Foreseen) -> None:
    old = place(org_id, 300)
    before = await ledger.writer.submit(old)
    await ledger.writer.submit(settle(org_id, old.hold_id, 10))
    answers = await both(ledger, place(org_id, 100), old, place(org_id, SIGNUP_NANO - 110))
    assert answers[1] == before
    assert isinstance(answers[2], Held), "the repeated hold reserves nothing"
    assert (foreseen.decided, foreseen.taken_back) == ([2], 1)
    assert (await ledger.wallet(org_id)).held == SIGNUP_NANO - 10
    await ledger.verified()


async def test_a_wallet_that_is_frozen_meanwhile_is_frozen_for_what_was_decided_ahead(
    ledger: Ledger, components: Components, org_id: UUID, foreseen: Foreseen
) -> None:
    await ledger.held(org_id, 100)
    freeze = f"UPDATE billing.wallet SET frozen_at = now() WHERE id = '{org_id}'"
    once("batch_committed", lambda: sql(ledger, components, freeze))
    answers = await both(ledger, place(org_id, 1), place(org_id, 2))
    assert isinstance(answers[0], Held)
    assert isinstance(answers[1], WalletFrozen)
    assert (foreseen.decided, foreseen.taken_back) == ([1], 1)
    assert (await ledger.wallet(org_id)).held == 101
    await ledger.verified()


async def test_a_fault_in_a_decision_ahead_leaves_no_trace(
    ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that is being written is kept, but not the books which the fault has left half changed."""
    decide_ahead = Batch.decide_ahead

    def failing(self: Batch, pendings: Sequence[Pending]) -> None:
        decide_ahead(self, pendings)
        raise RuntimeError("a fault")

    held = await ledger.held(org_id, 100)
    monkeypatch.setattr(Batch, "decide_ahead", failing)
    try:
        answers = await both(ledger, settle(org_id, held.hold_id, 60), place(org_id, 900))
    finally:
        failpoints.disarm()
    assert [getattr(answer, "available", None) for answer in answers] == [SIGNUP_NANO - 60, 40]
    monkeypatch.undo()
    with pytest.raises(CreditsReserved):
        await ledger.held(org_id, 41)
    await ledger.verified()


async def test_a_leader_that_gives_its_shard_back_writes_nothing_more(
    ledger: Ledger, org_id: UUID, foreseen: Foreseen
) -> None:
    """Whoever waits for what was decided ahead is sent to the next leader."""
    leaving, until = writer_beside(ledger, shard_of(org_id, SHARDS)), asyncio.Event()
    async with session(ledger) as connection:
        serving = asyncio.create_task(leaving.serve(connection, await epoch_of(ledger, org_id), until))
        await wait_until(lambda: accepts(leaving), "the writer")
        await leaving.enqueue(grant(org_id, 100))
        await leaving.enqueue(place(org_id, 10))
        answers: list[asyncio.Future[Result]] = []
        once("batch_decided", lambda: answers.append(leaving.enqueue(place(org_id, 30))))
        failpoints.arm("batch_written", until.set)
        assert isinstance(await leaving.enqueue(place(org_id, 20)), Held)
        await serving
    assert foreseen.decided == [1]
    assert leaving.waiting == 1
    leaving.release()
    with pytest.raises(NotLeading):
        await answers[0]
    assert (await ledger.wallet(org_id)).held == 30
    await ledger.verified()
