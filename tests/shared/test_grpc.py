"""gRPC between services: only services are answered, errors arrive as what they were, every call has a deadline."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from shared.clock import SystemClock
from shared.errors import InvalidRequest, PaymentRequired, Timeout, TollgateError, Unauthenticated, Unavailable
from shared.grpc import Caller, create_server
from shared.identity import Identity, IdentityRing
from shared.rpc import billing_pb2 as pb
from shared.rpc import billing_pb2_grpc as rpc
from shared.telemetry import GrpcMetrics

Behaviour = Callable[[pb.HoldRequest], Any]


def ring_of(letter: str) -> IdentityRing:
    return IdentityRing(f"a:{base64.b64encode(letter.encode() * 32).decode()}", SystemClock())


class Ledger(rpc.LedgerServicer):
    """Answers Hold with whatever the test says."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = lambda request: pb.HoldReply(hold_id=request.hold_id)

    async def Hold(self, request: pb.HoldRequest, context: Any) -> pb.HoldReply:
        result = self.behaviour(request)
        if asyncio.iscoroutine(result):
            result = await result
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, pb.HoldReply)
        return result


@pytest.fixture
async def server() -> AsyncIterator[tuple[Ledger, str, CollectorRegistry]]:
    registry = CollectorRegistry()
    server, ledger = create_server(ring_of("a"), GrpcMetrics(registry, "billing")), Ledger()
    rpc.add_LedgerServicer_to_server(ledger, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield ledger, f"127.0.0.1:{port}", registry
    await server.stop(None)


async def hold(target: str, ring: IdentityRing, timeout_s: float = 5) -> pb.HoldReply:
    caller = Caller(target, ring, service="chat")
    try:
        stub = rpc.LedgerStub(caller.channel)
        reply = await caller.call(stub.Hold, pb.HoldRequest(hold_id="h1"), timeout_s=timeout_s)
        assert isinstance(reply, pb.HoldReply)
        return reply
    finally:
        await caller.close()


Server = tuple[Ledger, str, CollectorRegistry]


async def test_a_service_is_answered(server: Server) -> None:
    assert (await hold(server[1], ring_of("a"))).hold_id == "h1"
    assert server[2].get_sample_value(
        "tollgate_grpc_requests_total", {"service": "billing", "method": "Hold", "code": "ok"}
    )


async def test_a_foreign_key_is_refused(server: Server) -> None:
    with pytest.raises(Unauthenticated):
        await hold(server[1], ring_of("b"))


async def test_a_user_s_identity_is_not_a_service_s(server: Server) -> None:
    async with aio.insecure_channel(server[1]) as channel:
        token = ring_of("a").sign(Identity(kind="user", user_id="u"))
        with pytest.raises(aio.AioRpcError) as e:
            await rpc.LedgerStub(channel).Hold(pb.HoldRequest(), metadata=(("authorization", f"Bearer {token}"),))
    assert e.value.code().name == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "raised", [PaymentRequired("No credits.", code="credits_reserved"), InvalidRequest(param="model")]
)
async def test_an_error_arrives_as_what_it_was(server: Server, raised: TollgateError) -> None:
    server[0].behaviour = lambda _request: raised
    with pytest.raises(type(raised)) as e:
        await hold(server[1], ring_of("a"))
    assert (e.value.code, e.value.message, e.value.param) == (raised.code, raised.message, raised.param)


async def test_a_crash_does_not_travel(server: Server) -> None:
    server[0].behaviour = lambda _request: RuntimeError("hunter2")
    with pytest.raises(TollgateError) as e:
        await hold(server[1], ring_of("a"))
    assert e.value.code == "internal_error"
    assert "hunter2" not in str(e.value)


async def test_a_call_ends_at_its_deadline(server: Server) -> None:
    async def never(_request: pb.HoldRequest) -> None:
        await asyncio.Event().wait()

    server[0].behaviour = never
    with pytest.raises(Timeout):
        await hold(server[1], ring_of("a"), timeout_s=0.1)


async def test_nobody_there_is_unavailable_at_once() -> None:
    with pytest.raises(Unavailable):
        await hold("127.0.0.1:1", ring_of("a"), timeout_s=30)
