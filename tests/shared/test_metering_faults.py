"""Metering when the ledger fails, or the process that holds: usage is not lost."""

from __future__ import annotations

import asyncio
import base64

import pytest
from pydantic import SecretStr

from services.billing.ledger.operations import Void
from shared.errors import Unavailable
from shared.metering import MeteringLimits, Receipt, Usage
from tests.billing.harness import SIGNUP_NANO, App, owner, running, wait_until
from tests.shared.metering_customer import Customer, address


async def has_answered(app: App, code: str) -> bool:
    """Whether the stream has ever been answered with this error."""
    lines = (await app.http.get("/metrics")).text.splitlines()
    return any('"Operate"' in line and f'"{code}"' in line for line in lines)


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


async def test_a_settlement_outlasts_a_rotation_of_keys(customer: Customer, owner_url: str) -> None:
    """Billing has the new keys before the caller has them."""
    gate, former = customer.billing.gate, customer.billing.app.grpc_target
    new_keys = SecretStr(f"new:{base64.b64encode(b'n' * 32).decode()}")
    async with running(owner_url, identity_keys=new_keys) as app, customer.hold() as hold:
        hold.record(Usage(3, 0, 21))
        gate.lead_to(*address(app.grpc_target))
        try:
            settling = asyncio.create_task(hold.settle(build="b", finish_reason="stop"))
            await wait_until(lambda: has_answered(app, "invalid_identity"), "the refusal of the caller")
            with pytest.raises(Unavailable):
                async with customer.hold(metering=customer.client(MeteringLimits(hold_timeout_s=0.2))):
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
    metering = customer.client(MeteringLimits(hold_ttl_ms=60_000, first_heartbeat_ms=50))
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
    metering = customer.client(MeteringLimits(hold_ttl_ms=60_000, first_heartbeat_ms=0))
    before = await customer.billing.heartbeats()
    async with customer.hold(metering=metering) as hold:
        hold.record(Usage(3, 0, 0))
        await customer.wallet()
        await hold.void("nothing came out")
        hold.record(Usage(3, 0, 1))
        await customer.wallet()
    await metering.close()
    assert await customer.billing.heartbeats() == before
