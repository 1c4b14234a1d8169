"""Metering against the real ledger: whatever happens to a request, its hold ends, and its tokens are paid once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import anyio
import pytest

from shared.errors import InvalidRequest, NotFound, PaymentRequired, Timeout, TollgateError, Unavailable
from shared.identity import Identity
from shared.metering import Receipt, Usage
from tests.billing.harness import MODEL, SIGNUP_NANO, wait_until
from tests.shared.metering_customer import Customer


async def test_a_request_pays_exactly_what_it_settles(customer: Customer) -> None:
    async with customer.hold() as hold:
        assert (hold.output_tokens, hold.amount_nano) == (100, 100)
        hold.record(Usage(3, 0, 10))
        hold.record(Usage(3, 0, 42))
        receipt = await hold.settle(build="chat-mini-q8_0", finish_reason="stop")
    assert receipt == Receipt(42, 42, 0, SIGNUP_NANO - 42)
    assert await customer.spent() == 42
    assert await customer.finish_reason() == "stop"


async def test_the_usage_of_the_settlement_itself_counts(customer: Customer) -> None:
    async with customer.hold() as hold:
        receipt = await hold.settle(build="b", finish_reason="length", usage=Usage(3, 1, 7), duration_ms=1234)
        assert receipt is not None
        assert await hold.settle(build="b", finish_reason="length") == receipt
    row = await customer.billing.ledger.pool.fetchrow(
        "SELECT * FROM billing.usage WHERE wallet_id = $1", customer.org_id
    )
    assert (row["input_tokens"], row["cached_input_tokens"], row["output_tokens"]) == (3, 1, 7)
    assert row["duration_ms"] == 1234


async def test_recorded_usage_never_goes_down(customer: Customer) -> None:
    async with customer.hold() as hold:
        hold.record(Usage(3, 0, 42))
        hold.record(Usage(0, 0, 7))
        assert hold.usage == Usage(3, 0, 42)
        await hold.void("test")
    assert await customer.spent() == 0


@pytest.mark.parametrize(("produced", "spent"), [(0, 0), (9, 9)])
async def test_a_request_that_fails_pays_what_it_produced(customer: Customer, produced: int, spent: int) -> None:
    async def request() -> None:
        async with customer.hold() as hold:
            hold.build = "chat-mini-q8_0"
            hold.record(Usage(3, 0, produced))
            raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"):
        await request()
    assert await customer.spent() == spent
    assert await customer.finish_reason() == ("error" if produced else None)


@pytest.mark.parametrize(("produced", "spent"), [(0, 0), (9, 9)])
async def test_a_request_that_is_cancelled_pays_what_it_produced(customer: Customer, produced: int, spent: int) -> None:
    started = asyncio.Event()

    async def request() -> None:
        async with customer.hold() as hold:
            hold.record(Usage(3, 0, produced))
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await customer.spent() == spent
    assert await customer.finish_reason() == ("cancelled" if produced else None)


async def test_a_scope_that_cancels_again_and_again_does_not_reach_the_settlement(customer: Customer) -> None:
    """As Starlette does when a client disconnects."""
    with anyio.CancelScope() as scope:
        async with customer.hold() as hold:
            hold.record(Usage(3, 0, 11))
            scope.cancel()
            await anyio.sleep_forever()
    await customer.until_spent(11)


async def test_a_stream_that_is_closed_in_the_middle_pays_what_it_produced(customer: Customer) -> None:
    async def stream() -> AsyncIterator[int]:
        async with customer.hold() as hold:
            for n in range(1, 50):
                hold.record(Usage(3, 0, n))
                yield n

    chunks = stream()
    async for n in chunks:
        if n == 6:
            break
    await chunks.aclose()  # type: ignore[attr-defined]
    assert await customer.spent() == 6
    assert await customer.finish_reason() == "cancelled"


async def test_a_settlement_waits_for_billing_to_come_back(customer: Customer) -> None:
    async with customer.hold() as hold:
        hold.record(Usage(3, 0, 21))
        customer.billing.gate.shut()
        settling = asyncio.create_task(hold.settle(build="b", finish_reason="stop"))
        done, _ = await asyncio.wait({settling}, timeout=0.3)
        assert not done
        customer.billing.gate.open()
        assert await settling == Receipt(21, 21, 0, SIGNUP_NANO - 21)
    assert await customer.spent() == 21
    assert customer.failed() == 0


async def test_an_answer_does_not_wait_for_billing_and_is_paid_when_it_is_back(customer: Customer) -> None:
    metering = customer.client(settle_wait_s=0.1)
    async with customer.hold(metering=metering) as hold:
        hold.record(Usage(3, 0, 21))
        customer.billing.gate.shut()
        assert await hold.settle(build="b", finish_reason="stop") is None
    assert metering.pending == 1
    customer.billing.gate.open()
    await metering.close(timeout_s=60)
    assert await customer.spent() == 21
    assert customer.failed() == 0


async def test_a_settlement_whose_answer_is_lost_is_taken_once(customer: Customer) -> None:
    async with customer.hold() as hold:
        hold.record(Usage(3, 0, 33))
        customer.billing.gate.lose_answer()
        receipt = await hold.settle(build="b", finish_reason="stop")
    assert receipt == Receipt(33, 33, 0, SIGNUP_NANO - 33)
    assert await customer.spent() == 33


async def test_a_hold_whose_answer_is_lost_is_placed_once(customer: Customer) -> None:
    async with customer.hold(10) as hold:
        await hold.settle(build="b", finish_reason="stop", usage=Usage(3, 0, 1))
    customer.billing.gate.lose_answer()
    async with customer.hold(50) as hold:
        assert (await customer.wallet()).held == 50
        await hold.settle(build="b", finish_reason="stop", usage=Usage(3, 0, 1))
    await customer.until_spent(2)


async def test_what_cannot_be_settled_is_left_to_the_sweeper_which_takes_the_last_heartbeat(customer: Customer) -> None:
    metering = customer.client(hold_ttl_ms=600, settle_wait_s=0.1, resolution_timeout_s=0.5, backoff_max_s=0.1)
    async with customer.hold(metering=metering) as hold:
        hold.record(Usage(3, 0, 17))
        await wait_until(lambda: customer.reported(17), "a heartbeat")
        hold.record(Usage(3, 0, 25))
        customer.billing.gate.shut()
        assert await hold.settle(build="b", finish_reason="stop") is None
    await metering.close(timeout_s=60)
    assert customer.failed() == 1
    customer.billing.gate.open()

    async def swept() -> bool:
        await customer.billing.ledger.sweeper.sweep()
        return (await customer.wallet()).held == 0

    await wait_until(swept, "the sweeper")
    assert await customer.spent() == 17


async def test_heartbeats_keep_a_long_request_alive(customer: Customer) -> None:
    metering = customer.client(hold_ttl_ms=300)
    async with customer.hold(metering=metering) as hold:
        placed = await customer.ends_at()

        async def outlived() -> bool:
            return await customer.ends_at() > placed + timedelta(milliseconds=5 * 300)

        await wait_until(outlived, "five lives of the hold")
        await hold.settle(build="b", finish_reason="stop", usage=Usage(3, 0, 5))
    await metering.close(timeout_s=60)
    assert await customer.spent() == 5


async def test_a_settlement_after_the_expiry_pays_the_remainder(customer: Customer) -> None:
    async with customer.hold() as hold:
        hold.record(Usage(3, 0, 60))
        await customer.billing.ledger.expire_now(hold.id)
        await customer.billing.ledger.sweeper.sweep()
        assert await customer.spent() == 0
        receipt = await hold.settle(build="b", finish_reason="stop")
    assert receipt == Receipt(60, 60, 0, SIGNUP_NANO - 60)
    assert await customer.spent() == 60


async def test_refusals_are_raised_and_leave_nothing_behind(customer: Customer) -> None:
    for tokens, code in ((SIGNUP_NANO + 1, "insufficient_quota"), (SIGNUP_NANO, ""), (1, "credits_reserved")):
        if not code:
            await customer.hold(tokens).__aenter__()
            continue
        with pytest.raises(PaymentRequired) as refused:
            async with customer.hold(tokens):
                raise AssertionError("the block is not entered")
        assert refused.value.code == code
    with pytest.raises(NotFound):
        async with customer.metering.hold(customer.identity, model="no", input_tokens=0, max_output_tokens=1):
            raise AssertionError("the block is not entered")
    assert customer.metering.pending == 0


async def test_a_clamped_hold_says_how_many_tokens_it_covers(customer: Customer) -> None:
    async with customer.hold(SIGNUP_NANO * 5, clamp=True) as hold:
        assert hold.output_tokens == SIGNUP_NANO
        await hold.void("test")


async def test_a_hold_covers_more_when_it_is_asked_and_says_so_when_it_cannot(customer: Customer) -> None:
    async with customer.hold(100) as hold:
        customer.billing.gate.lose_answer()
        assert await hold.extend(250) == hold.output_tokens == hold.amount_nano == 250
        assert (await customer.wallet()).held == 250
        assert await hold.extend(SIGNUP_NANO * 2) == SIGNUP_NANO
        with pytest.raises(PaymentRequired) as refused:
            await hold.extend(SIGNUP_NANO * 2)
        assert (refused.value.code, hold.output_tokens) == ("insufficient_quota", SIGNUP_NANO)
        receipt = await hold.settle(build="b", finish_reason="length", usage=Usage(3, 0, 700))
    assert receipt == Receipt(700, 700, 0, SIGNUP_NANO - 700)
    assert (await customer.wallet()).held == 0


async def test_without_billing_a_hold_stays_as_it_was(customer: Customer) -> None:
    metering = customer.client()
    async with customer.hold(100, metering=metering) as hold:
        patient = metering.limits
        customer.billing.gate.shut()
        metering.limits = replace(patient, hold_timeout_s=0.3)
        with pytest.raises(TollgateError):
            await hold.extend(200)
        customer.billing.gate.open()
        metering.limits = patient
        assert hold.output_tokens == 100

        async def longer() -> bool:
            with contextlib.suppress(Unavailable, Timeout):
                return await hold.extend(200) == 200
            return False

        await wait_until(longer, "an extension")
        await hold.void("test")
    await metering.close(timeout_s=60)


async def test_without_billing_no_request_begins(customer: Customer) -> None:
    customer.billing.gate.shut()
    with pytest.raises(Unavailable) as refused:
        async with customer.hold(metering=customer.client(hold_timeout_s=0.5)):
            raise AssertionError("the block is not entered")
    assert (refused.value.status, refused.value.code) == (503, "billing_unavailable")


async def test_a_request_that_is_cancelled_while_it_asks_for_a_hold_reserves_nothing_for_long(
    customer: Customer,
) -> None:
    async with customer.hold(1) as hold:
        await hold.void("open the wallet")
    async with customer.billing.ledger.stalled(customer.org_id):
        entering = asyncio.create_task(customer.hold(70).__aenter__())
        await wait_until(customer.billing.ledger.is_waited_for, "the wait for the shard")
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)

    async def voided() -> bool:
        operations: int = await customer.billing.ledger.pool.fetchval(
            "SELECT count(*) FROM billing.op WHERE tenant = $1 AND kind = 'void' AND refusal IS NULL", customer.org_id
        )
        return operations == 2

    await wait_until(voided, "the void")
    assert await customer.spent() == 0


async def test_a_caller_without_an_organisation_has_no_wallet(customer: Customer) -> None:
    with pytest.raises(InvalidRequest):
        customer.metering.hold(Identity(kind="anonymous"), model=MODEL, input_tokens=1, max_output_tokens=1)


async def test_too_many_pending_resolutions_are_given_up_at_once(customer: Customer) -> None:
    metering = customer.client(settle_wait_s=0.05, resolutions_pending_max=1)
    async with customer.hold(10, metering=metering) as one, customer.hold(10, metering=metering) as two:
        customer.billing.gate.shut()
        for hold in (one, two):
            assert await hold.settle(build="b", finish_reason="stop", usage=Usage(3, 0, 4)) is None
    assert (metering.pending, customer.failed()) == (1, 1)
    customer.billing.gate.open()
    await metering.close(timeout_s=60)
    wallet = await customer.wallet()
    assert (wallet.spent, wallet.held) == (4, 10)


async def test_prices_are_listed(customer: Customer) -> None:
    prices = {p.model: p.output_nano_per_million for p in await customer.metering.prices()}
    assert prices[MODEL] == 1_000_000
