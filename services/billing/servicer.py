"""gRPC ↔ ledger: what other services ask. Ids and figures are checked here; who may call, by the interceptor."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from services.billing.domain import Price, Usage
from services.billing.ledger.operations import Heartbeat, PlaceHold, Settle, Void
from services.billing.ledger.results import Extended, Held, Settled, Voided
from services.billing.ledger.writer import Ledger
from services.billing.service import Prices
from shared.errors import InvalidRequest
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerServicer

TTL_MS_MIN = 100
TTL_MS_MAX = 15 * 60 * 1000
TEXT_CHARS_MAX = 200
DURATION_MS_MAX = 7 * 24 * 3600 * 1000
UUID_VERSION_SORTED = 7


class Servicer(LedgerServicer):
    """Every method raises the ledger's refusals and LedgerUnavailable; InvalidRequest for a malformed message."""

    def __init__(self, ledger: Ledger, prices: Prices) -> None:
        self._ledger = ledger
        self._prices = prices

    async def Hold(self, request: pb.HoldRequest, context: Any) -> pb.HoldReply:
        operation = PlaceHold(
            wallet_id=_uuid(request.org_id, "org_id"),
            hold_id=_hold_id(request.hold_id),
            user_id=_optional_uuid(request.user_id, "user_id"),
            key_id=_optional_uuid(request.key_id, "key_id"),
            plan=_text(request.plan, "plan"),
            model=_text(request.model, "model"),
            worst_case=_usage(request.worst_case),
            clamp=request.clamp,
            ttl_ms=_ttl_ms(request.ttl_ms),
            request_id=_text(request.request_id, "request_id"),
        )
        held = await self._ledger.submit(operation)
        assert isinstance(held, Held)
        return pb.HoldReply(
            hold_id=str(held.hold_id),
            amount_nano=held.amount,
            output_tokens=held.output_tokens,
            price_id=str(held.price_id),
            expires_at=_timestamp(held.expires_at),
            available_nano=held.available,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        operation = Heartbeat(
            wallet_id=_uuid(request.org_id, "org_id"),
            hold_id=_hold_id(request.hold_id),
            usage=_usage(request.usage),
            ttl_ms=_ttl_ms(request.ttl_ms),
        )
        extended = await self._ledger.submit(operation)
        assert isinstance(extended, Extended)
        return pb.HeartbeatReply(expires_at=_timestamp(extended.expires_at))

    async def Settle(self, request: pb.SettleRequest, context: Any) -> pb.SettleReply:
        if not 0 <= request.duration_ms <= DURATION_MS_MAX:
            raise InvalidRequest(f"duration_ms is from 0 to {DURATION_MS_MAX}.", param="duration_ms")
        operation = Settle(
            wallet_id=_uuid(request.org_id, "org_id"),
            hold_id=_hold_id(request.hold_id),
            usage=_usage(request.usage),
            build=_text(request.build, "build"),
            finish_reason=_text(request.finish_reason, "finish_reason"),
            duration_ms=request.duration_ms,
        )
        settled = await self._ledger.submit(operation)
        assert isinstance(settled, Settled)
        return pb.SettleReply(
            cost_nano=settled.cost,
            settled_nano=settled.settled,
            receivable_nano=settled.receivable,
            available_nano=settled.available,
        )

    async def Void(self, request: pb.VoidRequest, context: Any) -> pb.VoidReply:
        operation = Void(
            wallet_id=_uuid(request.org_id, "org_id"),
            hold_id=_hold_id(request.hold_id),
            reason=_text(request.reason, "reason"),
        )
        voided = await self._ledger.submit(operation)
        assert isinstance(voided, Voided)
        return pb.VoidReply(released_nano=voided.released)

    async def ListPrices(self, request: pb.ListPricesRequest, context: Any) -> pb.ListPricesReply:
        org_id = _optional_uuid(request.org_id, "org_id")
        prices = await self._prices.in_force(org_id, _text(request.plan, "plan"))
        return pb.ListPricesReply(prices=[_price(p) for p in prices])


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
        return UUID(text)
    except ValueError:
        raise InvalidRequest(f"{name} is a UUID.", param=name) from None


def _optional_uuid(text: str, name: str) -> UUID | None:
    return _uuid(text, name) if text else None


def _hold_id(text: str) -> UUID:
    value = _uuid(text, "hold_id")
    if value.version != UUID_VERSION_SORTED:
        raise InvalidRequest("hold_id is a UUIDv7.", param="hold_id")
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
