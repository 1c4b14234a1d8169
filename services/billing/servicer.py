"""gRPC ↔ ledger: what other services ask. Ids and figures are checked here; who may call, by the interceptor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from services.billing.domain import Price, Usage
from services.billing.errors import LedgerUnavailable
from services.billing.ledger import wire
from services.billing.ledger.operations import ExtendHold, Heartbeat, Operation, PlaceHold, Settle, Void
from services.billing.ledger.results import Extended, Held, HoldExtended, Result, Settled, Voided
from services.billing.ledger.shards import Shards
from services.billing.ledger.writer import NotLeading
from services.billing.service import Prices
from shared.errors import Internal, InvalidRequest, TollgateError, to_metadata
from shared.ids import as_uuid
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerServicer
from shared.telemetry import get_logger
from shared.web import Readiness

log = get_logger(__name__)

TTL_MS_MIN = 100
TTL_MS_MAX = 15 * 60 * 1000
TEXT_CHARS_MAX = 200
DURATION_MS_MAX = 7 * 24 * 3600 * 1000
UUID_VERSION_SORTED = 7
UUID_TIME_SHIFT = 80
HOLD_ID_AHEAD_MAX_MS = 24 * 3600 * 1000
EXTENSIONS_MAX = 1_000  # of one hold
STREAM_OPERATIONS_MAX = 10_000
DRAIN_CHECK_S = 0.2


class Servicer(LedgerServicer):
    """Every method raises the ledger's refusals and LedgerUnavailable; InvalidRequest for a malformed message."""

    def __init__(self, ledger: Shards, prices: Prices, readiness: Readiness) -> None:
        self._ledger = ledger
        self._prices = prices
        self._readiness = readiness

    async def Hold(self, request: pb.HoldRequest, context: Any) -> pb.HoldReply:
        return _held(await self._ledger.submit(_place(request)))

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        return _extended(await self._ledger.submit(_heartbeat(request)))

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendReply:
        return _hold_extended(await self._ledger.submit(_extend(request)))

    async def Settle(self, request: pb.SettleRequest, context: Any) -> pb.SettleReply:
        return _settled(await self._ledger.submit(_settle(request)))

    async def Void(self, request: pb.VoidRequest, context: Any) -> pb.VoidReply:
        return _voided(await self._ledger.submit(_void(request)))

    async def Operate(self, requests: AsyncIterator[pb.OperateRequest], context: Any) -> None:
        """Operations go on when the stream breaks; their client asks again with the same ids."""
        stream = _Stream(self._ledger)
        tasks = [
            asyncio.create_task(work)
            for work in (stream.write_to(context), stream.read_from(requests), self._draining())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await stream.finish()
        finally:
            for task in tasks:
                task.cancel()

    async def _draining(self) -> None:
        """Returns when the process is to end: a stream would go on for ever."""
        while not self._readiness.draining:  # noqa: ASYNC110 - a flag of the runtime, looked at once a stream
            await asyncio.sleep(DRAIN_CHECK_S)

    async def ListPrices(self, request: pb.ListPricesRequest, context: Any) -> pb.ListPricesReply:
        org_id = _optional_uuid(request.org_id, "org_id")
        prices = await self._prices.in_force(org_id, _text(request.plan, "plan"))
        return pb.ListPricesReply(prices=[_price(p) for p in prices])

    async def ListLeaders(self, request: pb.ListLeadersRequest, context: Any) -> pb.ListLeadersReply:
        return pb.ListLeadersReply(addresses=await self._ledger.addresses())

    async def Forward(self, request: pb.ForwardRequest, context: Any) -> pb.ForwardReply:
        """Decided here or nowhere: what is forwarded is not forwarded again."""
        operation = wire.operation_from_bytes(request.operation)
        result = await self._ledger.writer_of(operation.wallet_id).enqueue(operation)
        return pb.ForwardReply(result=wire.result_to_bytes(operation, result))


class _Stream:
    """The operations of one stream: begun as they come, answered together whenever the stream can take more."""

    def __init__(self, ledger: Shards) -> None:
        self._ledger = ledger
        self._answers: list[pb.Answer] = []
        self._pending = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self, request: pb.Operation) -> None:
        """Start it; whatever happens becomes its answer."""
        kind = request.WhichOneof("request") or ""
        try:
            if kind not in _READERS:
                raise InvalidRequest("This is not an operation.")
            if self._pending >= STREAM_OPERATIONS_MAX:
                # No refusal: what is refused is not sent again, and a settlement has to be.
                raise LedgerUnavailable(code="billing_overloaded", retry_after_s=1)
            operation = _READERS[kind](getattr(request, kind))
            future = self._ledger.enqueue(operation)
        except TollgateError as e:
            self._answer(pb.Answer(id=request.id, error=to_metadata(e)))
            return
        self._pending += 1
        self._idle.clear()
        future.add_done_callback(partial(self._done, request.id, operation, kind))

    async def read_from(self, requests: AsyncIterator[pb.OperateRequest]) -> None:
        """Begin what comes, until the client sends no more."""
        async for request in requests:
            for operation in request.operations:
                self.begin(operation)

    async def write_to(self, context: Any) -> None:
        """Send answers for ever, all that there are in one message."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            answers, self._answers = self._answers, []
            await context.write(pb.OperateReply(answers=answers))
            if not self._pending and not self._answers:
                self._idle.set()

    async def finish(self) -> None:
        """Nothing more is read: answer what is under way."""
        await self._idle.wait()

    def _done(self, number: int, operation: Operation, kind: str, future: asyncio.Future[Result]) -> None:
        self._pending -= 1
        error = None if future.cancelled() else future.exception()
        if isinstance(error, NotLeading):
            self._pending += 1
            again = asyncio.ensure_future(self._ledger.submit(operation))
            again.add_done_callback(partial(self._done, number, operation, kind))
            return
        if error is None and not future.cancelled():
            answer = pb.Answer(id=number)
            getattr(answer, kind).CopyFrom(_REPLIES[kind](future.result()))
        elif isinstance(error, TollgateError):
            answer = pb.Answer(id=number, error=to_metadata(error))
        else:
            log.error("operation_failed", kind=kind, cause=type(error).__name__)
            answer = pb.Answer(id=number, error=to_metadata(Internal()))
        self._answer(answer)

    def _answer(self, answer: pb.Answer) -> None:
        self._answers.append(answer)
        self._idle.clear()
        self._wake.set()


def _place(request: pb.HoldRequest) -> PlaceHold:
    return PlaceHold(
        wallet_id=_uuid(request.org_id, "org_id"),
        hold_id=_new_hold_id(request.hold_id),
        user_id=_optional_uuid(request.user_id, "user_id"),
        key_id=_optional_uuid(request.key_id, "key_id"),
        plan=_text(request.plan, "plan"),
        model=_text(request.model, "model"),
        worst_case=_usage(request.worst_case),
        clamp=request.clamp,
        ttl_ms=_ttl_ms(request.ttl_ms),
        request_id=_text(request.request_id, "request_id"),
    )


def _heartbeat(request: pb.HeartbeatRequest) -> Heartbeat:
    return Heartbeat(
        wallet_id=_uuid(request.org_id, "org_id"),
        hold_id=_hold_id(request.hold_id),
        usage=_usage(request.usage),
        ttl_ms=_ttl_ms(request.ttl_ms),
    )


def _extend(request: pb.ExtendRequest) -> ExtendHold:
    if not 1 <= request.number <= EXTENSIONS_MAX:
        raise InvalidRequest(f"number is from 1 to {EXTENSIONS_MAX}.", param="number")
    return ExtendHold(
        wallet_id=_uuid(request.org_id, "org_id"),
        hold_id=_hold_id(request.hold_id),
        number=request.number,
        output_tokens=Usage(output_tokens=request.output_tokens).output_tokens,
    )


def _settle(request: pb.SettleRequest) -> Settle:
    if not 0 <= request.duration_ms <= DURATION_MS_MAX:
        raise InvalidRequest(f"duration_ms is from 0 to {DURATION_MS_MAX}.", param="duration_ms")
    return Settle(
        wallet_id=_uuid(request.org_id, "org_id"),
        hold_id=_hold_id(request.hold_id),
        usage=_usage(request.usage),
        build=_text(request.build, "build"),
        finish_reason=_text(request.finish_reason, "finish_reason"),
        duration_ms=request.duration_ms,
    )


def _void(request: pb.VoidRequest) -> Void:
    return Void(
        wallet_id=_uuid(request.org_id, "org_id"),
        hold_id=_hold_id(request.hold_id),
        reason=_text(request.reason, "reason"),
    )


def _held(result: Result) -> pb.HoldReply:
    assert isinstance(result, Held)
    return pb.HoldReply(
        hold_id=str(result.hold_id),
        amount_nano=result.amount,
        output_tokens=result.output_tokens,
        price_id=str(result.price_id),
        expires_at=_timestamp(result.expires_at),
        available_nano=result.available,
    )


def _hold_extended(result: Result) -> pb.ExtendReply:
    assert isinstance(result, HoldExtended)
    return pb.ExtendReply(
        hold_id=str(result.hold_id),
        amount_nano=result.amount,
        output_tokens=result.output_tokens,
        available_nano=result.available,
    )


def _extended(result: Result) -> pb.HeartbeatReply:
    assert isinstance(result, Extended)
    return pb.HeartbeatReply(expires_at=_timestamp(result.expires_at))


def _settled(result: Result) -> pb.SettleReply:
    assert isinstance(result, Settled)
    return pb.SettleReply(
        cost_nano=result.cost,
        settled_nano=result.settled,
        receivable_nano=result.receivable,
        available_nano=result.available,
    )


def _voided(result: Result) -> pb.VoidReply:
    assert isinstance(result, Voided)
    return pb.VoidReply(released_nano=result.released)


def _price(price: Price) -> pb.Price:
    return pb.Price(
        price_id=str(price.id),
        model=price.model,
        customer_class=price.customer_class,
        per_request_nano=price.terms.per_request,
        input_nano_per_million=price.terms.input,
        cached_input_nano_per_million=price.terms.cached_input,
        output_nano_per_million=price.terms.output,
        valid_from=_timestamp(price.valid_from),
    )


def _uuid(text: str, name: str) -> UUID:
    try:
        return as_uuid(text)
    except ValueError:
        raise InvalidRequest(f"{name} is a UUID.", param=name) from None


def _optional_uuid(text: str, name: str) -> UUID | None:
    return _uuid(text, name) if text else None


def _hold_id(text: str) -> UUID:
    value = _uuid(text, "hold_id")
    if value.version != UUID_VERSION_SORTED:
        raise InvalidRequest("hold_id is a UUIDv7.", param="hold_id")
    return value


def _new_hold_id(text: str) -> UUID:
    """Its time says in which month's partitions it is kept: one from a clock far ahead would be in none."""
    value = _hold_id(text)
    if value.int >> UUID_TIME_SHIFT > time.time() * 1000 + HOLD_ID_AHEAD_MAX_MS:
        raise InvalidRequest("hold_id is of a time more than a day ahead.", param="hold_id", code="hold_id_in_future")
    return value


def _text(text: str, name: str) -> str:
    if len(text) > TEXT_CHARS_MAX or "\x00" in text:
        raise InvalidRequest(f"{name} is at most {TEXT_CHARS_MAX} characters.", param=name)
    return text


def _ttl_ms(ttl_ms: int) -> int:
    if not TTL_MS_MIN <= ttl_ms <= TTL_MS_MAX:
        raise InvalidRequest(f"ttl_ms is from {TTL_MS_MIN} to {TTL_MS_MAX}.", param="ttl_ms")
    return ttl_ms


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.input_tokens, usage.cached_input_tokens, usage.output_tokens)


def _timestamp(at: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp


_READERS: dict[str, Callable[[Any], Operation]] = {
    "hold": _place,
    "heartbeat": _heartbeat,
    "extend": _extend,
    "settle": _settle,
    "void": _void,
}
_REPLIES: dict[str, Callable[[Result], Any]] = {
    "hold": _held,
    "heartbeat": _extended,
    "extend": _hold_extended,
    "settle": _settled,
    "void": _voided,
}
