"""A hold that is extended while it is open: by as much as there is, never beyond a budget, once for each attempt."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from services.billing.errors import (
    BudgetExceeded,
    CreditsReserved,
    HoldNotFound,
    HoldResolved,
    IdempotencyMismatch,
    InsufficientCredits,
    WalletFrozen,
)
from services.billing.ledger.operations import ExtendHold, Freeze, Void
from services.billing.ledger.results import Held, HoldExtended
from shared.errors import InvalidRequest, NotFound, PaymentRequired
from shared.grpc import Caller
from shared.ids import uuid7
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from tests.billing.harness import SIGNUP_NANO, App, Ledger, caller, grant, settle
from tests.billing.test_grpc import hold_request

POOR = 100


async def opened(ledger: Ledger, org_id: UUID, tokens: int, **changes: object) -> Held:
    """A clamped hold on a wallet of POOR."""
    await ledger.writer.submit(grant(org_id, POOR))
    return await ledger.held(org_id, tokens, clamp=True, **changes)


async def extended(ledger: Ledger, org_id: UUID, hold_id: UUID, number: int, tokens: int) -> HoldExtended:
    result = await ledger.writer.submit(ExtendHold(org_id, hold_id, number, tokens))
    assert isinstance(result, HoldExtended)
    return result


async def test_credits_that_came_meanwhile_are_held_and_settled_exactly(ledger: Ledger, org_id: UUID) -> None:
    held = await opened(ledger, org_id, 300, user_id=None)
    assert held.output_tokens == POOR
    with pytest.raises(InsufficientCredits):
        await extended(ledger, org_id, held.hold_id, 1, 300)
    await ledger.writer.submit(grant(org_id, 50))
    assert await extended(ledger, org_id, held.hold_id, 2, 300) == HoldExtended(held.hold_id, 150, 150, 0)
    await ledger.writer.submit(grant(org_id, 500))
    assert await extended(ledger, org_id, held.hold_id, 3, 300) == HoldExtended(held.hold_id, 300, 300, 350)
    await ledger.verified()
    await ledger.writer.submit(settle(org_id, held.hold_id, 290))
    wallet = await ledger.wallet(org_id)
    assert (wallet.spent, wallet.held, wallet.available, wallet.receivable) == (290, 0, 360, 0)
    await ledger.verified()


async def test_an_attempt_that_arrives_late_is_no_fault_of_the_books(ledger: Ledger, org_id: UUID) -> None:
    """Attempts are numbered by who makes them; one may overtake another."""
    held = await ledger.held(org_id, 10)
    for number, tokens in ((4, 20), (2, 30), (3, 25)):
        await extended(ledger, org_id, held.hold_id, number, tokens)
    await ledger.verified()


async def test_an_extension_that_asks_for_no_more_changes_nothing(ledger: Ledger, org_id: UUID) -> None:
    held = await opened(ledger, org_id, 40, user_id=None)
    assert await extended(ledger, org_id, held.hold_id, 1, 40) == HoldExtended(held.hold_id, 40, 40, 60)
    assert (
        await ledger.pool.fetchval("SELECT count(*) FROM billing.hold_extension WHERE hold_id = $1", held.hold_id) == 0
    )


async def test_the_same_attempt_again_reserves_once_and_another_under_its_number_is_refused(
    ledger: Ledger, org_id: UUID
) -> None:
    held = await opened(ledger, org_id, 10, user_id=None)
    answers = await asyncio.gather(*(extended(ledger, org_id, held.hold_id, 1, 30) for _ in range(10)))
    assert set(answers) == {HoldExtended(held.hold_id, 30, 30, 70)}
    with pytest.raises(IdempotencyMismatch):
        await extended(ledger, org_id, held.hold_id, 1, 31)
    assert (await ledger.wallet(org_id)).held == 30


async def test_what_others_hold_is_another_refusal_than_no_credits(ledger: Ledger, org_id: UUID) -> None:
    held = await opened(ledger, org_id, 60, user_id=None)
    other = await ledger.held(org_id, 40, user_id=None)
    with pytest.raises(CreditsReserved):
        await extended(ledger, org_id, held.hold_id, 1, 61)
    await ledger.writer.submit(Void(org_id, other.hold_id, "test"))
    assert (await extended(ledger, org_id, held.hold_id, 2, 200)).output_tokens == POOR
    with pytest.raises(InsufficientCredits):
        await extended(ledger, org_id, held.hold_id, 3, 200)


async def test_budgets_bound_extensions_and_count_them(ledger: Ledger, org_id: UUID) -> None:
    key_id = uuid4()
    held = await opened(ledger, org_id, 20, key_id=key_id, user_id=None)
    await ledger.pool.execute(
        "INSERT INTO billing.budget VALUES ($1, 'key', $2, 'day', 50, clock_timestamp())", org_id, key_id
    )
    assert (await extended(ledger, org_id, held.hold_id, 1, 80)).output_tokens == 50
    with pytest.raises(BudgetExceeded):
        await extended(ledger, org_id, held.hold_id, 2, 80)
    # A writer that loads the wallet anew counts what is held in all.
    await ledger.pool.execute("UPDATE billing.wallet SET version = version + 1 WHERE id = $1", org_id)
    with pytest.raises(BudgetExceeded):
        await ledger.held(org_id, 1, key_id=key_id, user_id=None)
    await ledger.writer.submit(settle(org_id, held.hold_id, 45))
    assert (await ledger.held(org_id, 9, key_id=key_id, user_id=None, clamp=True)).output_tokens == 5


async def test_holds_that_are_over_or_of_others_or_of_frozen_wallets_are_not_extended(
    ledger: Ledger, org_id: UUID
) -> None:
    held = await opened(ledger, org_id, 20, user_id=None)
    stranger = uuid4()
    await ledger.writer.submit(grant(stranger, 50))
    with pytest.raises(HoldNotFound):
        await extended(ledger, stranger, held.hold_id, 1, 30)
    for number, frozen in enumerate((True, False), 1):
        await ledger.writer.submit(Freeze(org_id, org_id, f"key:{uuid4()}", "user:test", frozen, "test"))
        if frozen:
            with pytest.raises(WalletFrozen):
                await extended(ledger, org_id, held.hold_id, number, 30)
        else:
            assert (await extended(ledger, org_id, held.hold_id, number, 30)).output_tokens == 30
    await ledger.writer.submit(settle(org_id, held.hold_id, 30))
    with pytest.raises(HoldResolved):
        await extended(ledger, org_id, held.hold_id, 3, 40)


async def test_a_writer_that_knows_nothing_of_an_extended_hold_settles_it_exactly(ledger: Ledger, org_id: UUID) -> None:
    """The books are loaded anew: credits of two grants, one of which the hold drew on twice."""
    held = await opened(ledger, org_id, 30, user_id=None)
    await extended(ledger, org_id, held.hold_id, 1, 90)
    await ledger.writer.submit(grant(org_id, 60))
    await extended(ledger, org_id, held.hold_id, 2, 130)
    slices = await ledger.pool.fetchval("SELECT count(*) FROM billing.hold_slice WHERE hold_id = $1", held.hold_id)
    assert slices == 4
    await ledger.expire_now(held.hold_id)
    await ledger.sweeper.sweep()
    assert (await ledger.wallet(org_id)).held == 0
    await ledger.writer.submit(settle(org_id, held.hold_id, 128))
    assert (await ledger.wallet(org_id)).spent == 128
    await ledger.verified()


async def test_extensions_travel_by_call_and_by_stream(app: App, ledger: Ledger, org_id: UUID) -> None:
    await ledger.writer.submit(grant(org_id, POOR))
    chat: Caller = caller(app.grpc_target)
    stub = LedgerStub(chat.channel)
    held = await chat.call(stub.Hold, hold_request(org_id, 40, user_id=""))
    ask = pb.ExtendRequest(hold_id=held.hold_id, org_id=str(org_id), number=1, output_tokens=70)
    first = await chat.call(stub.Extend, ask)
    assert (first.amount_nano, first.output_tokens, first.available_nano) == (70, 70, 30)
    stream = chat.stream(stub.Operate)
    await stream.write(pb.OperateRequest(operations=[pb.Operation(id=1, extend=ask)]))
    (answer,) = (await stream.read()).answers
    assert answer.extend == first
    stream.cancel()
    for number, tokens in ((0, 80), (1_001, 80), (2, -1)):
        with pytest.raises(InvalidRequest):
            await chat.call(
                stub.Extend,
                pb.ExtendRequest(hold_id=held.hold_id, org_id=str(org_id), number=number, output_tokens=tokens),
            )
    nobody = pb.ExtendRequest(hold_id=str(uuid7()), org_id=str(org_id), number=1, output_tokens=5)
    with pytest.raises(NotFound):
        await chat.call(stub.Extend, nobody)
    ask.number, ask.output_tokens = 3, 71 + SIGNUP_NANO
    assert (await chat.call(stub.Extend, ask)).output_tokens == POOR
    ask.number = 4
    with pytest.raises(PaymentRequired):
        await chat.call(stub.Extend, ask)
    await chat.close()
