"""Metering when the ledger fails, or the process that holds: usage is not lost."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from services.billing.ledger.operations import Void
from services.billing.servicer import Servicer
from shared.clock import SystemClock
from shared.errors import Unavailable
from shared.grpc import create_server
from shared.identity import IdentityRing
from shared.metering import Receipt, Usage
from shared.rpc.billing_pb2_grpc import add_LedgerServicer_to_server
from shared.telemetry import GrpcMetrics
from shared.web import Readiness
from tests.billing.harness import SIGNUP_NANO, Ledger, owner, wait_until
from tests.shared.metering_customer import Customer, address


@asynccontextmanager
async def with_other_keys(ledger: Ledger) -> AsyncIterator[tuple[str, CollectorRegistry]]:
    """The same ledger at an address where other identity keys are valid. It leads nothing of its own: whether others
    may ask it for what it leads is another question.
    """
    registry = CollectorRegistry()
    ring = IdentityRing(f"new:{base64.b64encode(b'n' * 32).decode()}", SystemClock())
    server = create_server(ring, GrpcMetrics(registry, "billing"))
    add_LedgerServicer_to_server(Servicer(ledger.writer, ledger.prices, Readiness()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", registry
    finally:
        await server.stop(0)


async def has_refused(registry: CollectorRegistry) -> bool:
    """Whether a stream was refused for its identity."""
    labels = {"service": "billing", "method": "Operate", "code": "invalid_identity"}
    return registry.get_sample_value("tollgate_grpc_requests_total", labels) is not None


async def test_a_settlement_outlasts_a_fault_of_the_ledger(customer: Customer) -> None:
    """One that says internal_error, which a refusal never does."""
    connection = await owner(customer.billing.ledger.owner_url)
    async with customer.hold() as hold:
        hold.record(Usage(3, 0, 21))
        await connection.execute("ALTER TABLE billing.usage ADD CONSTRAINT fault CHECK (false) NOT VALID")
        try:
            settling = asyncio.create_task(hold.settle(build="b", finish_reason="stop"))
            await wait_until(lambda: customer.billing.has_failed("settle"), "the fault")
        finally:
            await connection.execute("ALTER TABLE billing.usage DROP CONSTRAINT fault")
            await connection.close()
        assert await settling == Receipt(21, 21, 0, SIGNUP_NANO - 21)
    assert await customer.spent() == 21
    assert customer.failed() == 0


async def test_a_settlement_outlasts_a_rotation_of_keys(customer: Customer) -> None:
    """Billing has the new keys before the caller has them."""
    gate, former = customer.billing.gate, customer.billing.app.grpc_target
    async with customer.hold() as hold, with_other_keys(customer.billing.ledger) as (target, registry):
        hold.record(Usage(3, 0, 21))
        gate.lead_to(*address(target))
        try:
            settling = asyncio.create_task(hold.settle(build="b", finish_reason="stop"))
            await wait_until(lambda: has_refused(registry), "the refusal of the caller")
            with pytest.raises(Unavailable):
                async with customer.hold(metering=customer.client(hold_timeout_s=0.2)):
                    raise AssertionError("the block is not entered")
        finally:
            gate.lead_to(*address(former))
        assert await settling == Receipt(21, 21, 0, SIGNUP_NANO - 21)
    assert customer.failed() == 0


async def test_a_refused_settlement_is_given_up_at_once(customer: Customer) -> None:
    async with customer.hold() as hold:
        await customer.billing.ledger.writer.submit(Void(customer.org_id, hold.id, "by somebody else"))
        assert await hold.settle(build="b", finish_reason="stop", usage=Usage(3, 0, 21)) is None
    assert (customer.metering.pending, customer.failed()) == (0, 1)
    assert await customer.spent() == 0


async def test_a_process_that_dies_soon_after_its_first_tokens_pays_them(customer: Customer) -> None:
    """The next regular heartbeat is 20 s away."""
    metering = customer.client(first_heartbeat_ms=50, settle_wait_s=0.1)
    hold = customer.hold(metering=metering)
    await hold.__aenter__()
    hold.record(Usage(3, 0, 0))
    hold.record(Usage(3, 0, 1))
    hold.record(Usage(3, 0, 8))
    await wait_until(lambda: customer.reported(8), "the first heartbeat")
    customer.billing.gate.shut()  # as good as dead: nothing that it does reaches the ledger again
    await customer.billing.ledger.expire_now(hold.id)
    await customer.billing.ledger.sweeper.sweep()
    assert await customer.spent() == 8
    await hold.void("end the timer")


async def test_heartbeats_come_early_only_after_an_output_token_and_never_after_the_end(customer: Customer) -> None:
    metering = customer.client(first_heartbeat_ms=0)
    before = await customer.billing.heartbeats()
    async with customer.hold(metering=metering) as hold:
        hold.record(Usage(3, 0, 0))
        await customer.wallet()
        await hold.void("nothing came out")
        hold.record(Usage(3, 0, 1))
        await customer.wallet()
    await metering.close()
    assert await customer.billing.heartbeats() == before
