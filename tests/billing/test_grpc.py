"""The ledger over gRPC, as chat sees it."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from grpc import aio

from services.billing import servicer
from services.billing.domain import PriceTerms
from shared.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PaymentRequired,
    TollgateError,
    Unauthenticated,
    Unprocessable,
    from_metadata,
)
from shared.grpc import Caller
from shared.ids import uuid7
from shared.metering import REFUSAL_STATUSES
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from tests.billing.harness import MODEL, App, Ledger, caller, grant, wait_until

HOLDERS = 100
EXACTLY = 37
PRICE = 100


def hold_request(wallet: UUID, output_tokens: int = 10, **changes: Any) -> pb.HoldRequest:
    values: dict[str, Any] = {
        "hold_id": str(uuid7()),
        "org_id": str(wallet),
        "user_id": str(uuid4()),
        "plan": "default",
        "model": MODEL,
        "worst_case": pb.Usage(output_tokens=output_tokens),
        "ttl_ms": 60_000,
    }
    return pb.HoldRequest(**{**values, **changes})


async def test_a_request_over_the_wire(app: App, org_id: UUID) -> None:
    chat = caller(app.grpc_target)
    ledger = LedgerStub(chat.channel)
    held = await chat.call(ledger.Hold, hold_request(org_id, 300))
    assert (held.amount_nano, held.output_tokens, held.available_nano) == (300, 300, 700)
    beat = pb.HeartbeatRequest(hold_id=held.hold_id, org_id=str(org_id), usage=pb.Usage(output_tokens=5), ttl_ms=90_000)
    extended = await chat.call(ledger.Heartbeat, beat)
    assert extended.expires_at.ToDatetime() > held.expires_at.ToDatetime()
    request = pb.SettleRequest(
        hold_id=held.hold_id, org_id=str(org_id), usage=pb.Usage(output_tokens=120), build="b", finish_reason="stop"
    )
    settled = await chat.call(ledger.Settle, request)
    figures = (settled.cost_nano, settled.settled_nano, settled.receivable_nano, settled.available_nano)
    assert figures == (120, 120, 0, 880)
    other = await chat.call(ledger.Hold, hold_request(org_id, 50))
    void = pb.VoidRequest(hold_id=other.hold_id, org_id=str(org_id), reason="engine_error")
    assert (await chat.call(ledger.Void, void)).released_nano == 50
    listed = await chat.call(ledger.ListPrices, pb.ListPricesRequest())
    assert (MODEL, 1_000_000) in [(p.model, p.output_nano_per_million) for p in listed.prices]
    await chat.close()


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"worst_case": pb.Usage(output_tokens=1_001)}, PaymentRequired, "insufficient_quota"),
        ({"model": "nobody"}, NotFound, "model_not_priced"),
        ({"hold_id": "x"}, InvalidRequest, "invalid_request"),
        ({"hold_id": str(uuid4())}, InvalidRequest, "invalid_request"),
        ({"hold_id": str(uuid7(int(time.time() * 1000) + 25 * 3_600_000))}, InvalidRequest, "hold_id_in_future"),
        ({"org_id": ""}, InvalidRequest, "invalid_request"),
        ({"ttl_ms": 0}, InvalidRequest, "invalid_request"),
        ({"ttl_ms": 2**31 - 1}, InvalidRequest, "invalid_request"),
        ({"worst_case": pb.Usage(output_tokens=-1)}, InvalidRequest, "invalid_request"),
        ({"worst_case": pb.Usage(output_tokens=2**62)}, InvalidRequest, "invalid_request"),
        ({"worst_case": pb.Usage(input_tokens=1, cached_input_tokens=2)}, InvalidRequest, "invalid_request"),
        ({"model": "m" * 201}, InvalidRequest, "invalid_request"),
        ({"request_id": "a\x00b"}, InvalidRequest, "invalid_request"),
    ],
)
async def test_refusals_travel_whole(
    app: App, org_id: UUID, changes: dict[str, Any], error: type[TollgateError], code: str
) -> None:
    chat = caller(app.grpc_target)
    with pytest.raises(error) as refused:
        await chat.call(LedgerStub(chat.channel).Hold, hold_request(org_id, **changes))
    assert refused.value.code == code
    await chat.close()


async def test_a_clock_that_is_a_little_ahead_may_name_a_hold(app: App, org_id: UUID) -> None:
    chat = caller(app.grpc_target)
    ahead = str(uuid7(int(time.time() * 1000) + 23 * 3_600_000))
    assert (await chat.call(LedgerStub(chat.channel).Hold, hold_request(org_id, hold_id=ahead))).hold_id == ahead
    await chat.close()


async def test_a_cost_that_no_counter_holds_is_an_invalid_request(app: App, ledger: Ledger, org_id: UUID) -> None:
    await ledger.prices.bring_up_to_date("gold", "default", PriceTerms(0, 0, 0, 2**62), "test")
    chat = caller(app.grpc_target)
    with pytest.raises(InvalidRequest) as refused:
        await chat.call(LedgerStub(chat.channel).Hold, hold_request(org_id, 10**9, model="gold"))
    assert refused.value.code == "invalid_request"
    await chat.close()


async def test_the_same_id_with_another_body_is_refused(app: App, org_id: UUID) -> None:
    chat = caller(app.grpc_target)
    ledger = LedgerStub(chat.channel)
    request = hold_request(org_id)
    first, again = await chat.call(ledger.Hold, request), await chat.call(ledger.Hold, request)
    assert first == again
    other = pb.HoldRequest()
    other.CopyFrom(request)
    other.worst_case.output_tokens += 1
    with pytest.raises(Unprocessable) as refused:
        await chat.call(ledger.Hold, other)
    assert refused.value.code == "idempotency_mismatch"
    await chat.call(ledger.Void, pb.VoidRequest(hold_id=request.hold_id, org_id=str(org_id)))
    with pytest.raises(Conflict) as resolved:
        await chat.call(ledger.Settle, pb.SettleRequest(hold_id=request.hold_id, org_id=str(org_id)))
    assert resolved.value.code == "hold_resolved"
    await chat.close()


async def test_of_a_hundred_concurrent_holders_on_a_balance_for_k_exactly_k_succeed(
    app: App, ledger: Ledger, org_id: UUID
) -> None:
    await ledger.writer.submit(grant(org_id, EXACTLY * PRICE + PRICE - 1))
    chats = [caller(app.grpc_target) for _ in range(4)]

    async def attempt(number: int) -> pb.HoldReply | str:
        chat = chats[number % len(chats)]
        request = hold_request(org_id, PRICE)
        try:
            reply: pb.HoldReply = await chat.call(LedgerStub(chat.channel).Hold, request)
        except PaymentRequired as e:
            return e.code
        return reply

    answers = await asyncio.gather(*(attempt(n) for n in range(HOLDERS)))
    held = [a for a in answers if isinstance(a, pb.HoldReply)]
    assert len(held) == EXACTLY
    assert {a for a in answers if isinstance(a, str)} == {"credits_reserved"}
    assert (await ledger.wallet(org_id)).available == PRICE - 1
    chat = chats[0]
    for reply in held:
        request = pb.SettleRequest(hold_id=reply.hold_id, org_id=str(org_id), usage=pb.Usage(output_tokens=PRICE))
        await chat.call(LedgerStub(chat.channel).Settle, request)
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.spent, wallet.receivable) == (PRICE - 1, EXACTLY * PRICE, 0)
    with pytest.raises(PaymentRequired) as refused:
        await chat.call(LedgerStub(chat.channel).Hold, hold_request(org_id, PRICE))
    assert refused.value.code == "insufficient_quota"
    await asyncio.gather(*(c.close() for c in chats))
    await ledger.verified()


async def test_a_stream_with_too_much_in_flight_says_so_in_a_way_that_is_tried_again(
    app: App, ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "STREAM_OPERATIONS_MAX", 2)
    chat = caller(app.grpc_target)
    async with ledger.stalled(org_id):
        stream = chat.stream(LedgerStub(chat.channel).Operate)
        holds = [pb.Operation(id=n, hold=hold_request(org_id)) for n in range(3)]
        await stream.write(pb.OperateRequest(operations=holds))
        (answer,) = (await stream.read()).answers
    refused = from_metadata(answer.error)
    assert (answer.id, refused.code) == (2, "billing_overloaded")
    assert refused.status not in REFUSAL_STATUSES, "a settlement that is refused is lost"
    stream.cancel()
    await chat.close()


async def test_concurrent_identical_holds_reserve_once(app: App, ledger: Ledger, org_id: UUID) -> None:
    chat = caller(app.grpc_target)
    request = hold_request(org_id, 25)
    stub = LedgerStub(chat.channel)
    replies = await asyncio.gather(*(chat.call(stub.Hold, request) for _ in range(20)))
    assert len({r.SerializeToString(deterministic=True) for r in replies}) == 1
    assert (await ledger.wallet(org_id)).held == 25
    await chat.close()


async def test_nobody_calls_without_a_service_identity(app: App, org_id: UUID) -> None:
    async with aio.insecure_channel(app.grpc_target) as channel:
        with pytest.raises(aio.AioRpcError) as refused:
            await LedgerStub(channel).Hold(hold_request(org_id), timeout=60)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    metadata: Any = refused.value.trailing_metadata()
    trailing = dict(metadata)
    assert isinstance(from_metadata(trailing["tollgate-error-bin"]), Unauthenticated)


async def test_an_operation_whose_caller_goes_away_is_finished(app: App, ledger: Ledger, org_id: UUID) -> None:
    chat: Caller = caller(app.grpc_target)
    await chat.call(LedgerStub(chat.channel).Hold, hold_request(org_id, 1))
    request = hold_request(org_id, 30)
    async with ledger.stalled(org_id):
        call = asyncio.create_task(chat.call(LedgerStub(chat.channel).Hold, request))
        await wait_until(ledger.is_waited_for, "the wait for the shard")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def held() -> bool:
        return (await ledger.wallet(org_id)).held == 31

    await wait_until(held, "the hold")
    await chat.close()
