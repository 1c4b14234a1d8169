"""Money that went back takes its credits along, once, whatever the provider's webhooks do; disputes freeze."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from pydantic import SecretStr

from services.billing.errors import NothingToRefund
from services.billing.ledger.operations import Refund, TakeBack
from services.billing.ledger.results import TakenBack
from shared.ids import uuid7
from tests.billing.harness import App, Ledger, grant, operator, running, settle, signed
from tests.billing.stripe_double import SECRET_KEY, WEBHOOK_SECRET, StripeDouble, stripe_double
from tests.billing.test_payments import CREDITS, buyer, key, ordered, status, told

MONEY = 25  # cents of one top-up
CENT = CREDITS // MONEY


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stripe() -> AsyncIterator[StripeDouble]:
    async with stripe_double() as double:
        yield double


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(owner_url: str, ledger: Ledger, stripe: StripeDouble) -> AsyncIterator[App]:
    async with running(
        owner_url,
        signup_credits="0",
        stripe_secret_key=SecretStr(SECRET_KEY),
        stripe_webhook_secret=SecretStr(WEBHOOK_SECRET),
        stripe_api_url=stripe.url,
        stripe_timeout_s=60,
        billing_operation_timeout_s=60,
        topup_credits_min="1",
    ) as app:
        yield app


async def paid(shop: App, stripe: StripeDouble, org_id: UUID) -> str:
    topup = await ordered(shop, buyer(org_id))
    assert await told(shop, stripe.pay(topup["id"])) == 204
    return str(topup["id"])


async def sums(ledger: Ledger, org_id: UUID) -> tuple[int, int]:
    wallet = await ledger.wallet(org_id)
    return wallet.available, wallet.receivable


async def transactions(shop: App, org_id: UUID) -> list[dict[str, Any]]:
    answer = await shop.http.get("/api/v1/billing/transactions", headers=signed(buyer(org_id)))
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def test_a_refund_takes_its_part_of_the_credits_and_the_rest_of_it_the_rest(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    topup = await paid(shop, stripe, org_id)
    for money, left in ((10, 15 * CENT), (15, 0)):
        for event in stripe.refund(topup, money):
            assert await told(shop, event) == 204
        assert await sums(ledger, org_id) == (left, 0)
    found = [t for t in await transactions(shop, org_id) if t["kind"] == "reversal"]
    assert [(t["amount"], t["hold_id"]) for t in found] == [("-15.00", topup), ("-10.00", topup)]
    assert {t["reason"] for t in found} == {f"Money of top-up {topup} went back"}
    await ledger.verified()


async def test_what_was_spent_of_it_is_owed_and_other_credits_pay_that(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    topup = await paid(shop, stripe, org_id)
    request = await ledger.held(org_id, 10**9, clamp=True, user_id=None)
    await ledger.writer.submit(settle(org_id, request.hold_id, 10**9))
    assert (await ledger.wallet(org_id)).spent == 10**9
    for event in stripe.refund(topup, MONEY):
        assert await told(shop, event) == 204
    assert await sums(ledger, org_id) == (0, 10**9)
    await ledger.writer.submit(grant(org_id, 3 * 10**9))
    assert await sums(ledger, org_id) == (2 * 10**9, 0)
    await ledger.verified()


@pytest.mark.parametrize("seed", range(3))
async def test_events_in_any_order_and_number_take_back_once(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID, seed: int
) -> None:
    """The refund may be the first that is heard of a payment at all."""
    rng = random.Random(seed)
    topups = [await ordered(shop, buyer(org_id)) for _ in range(3)]
    events = []
    for topup in topups:
        events += [stripe.expire(topup["id"]), stripe.pay(topup["id"])]
        events += [*stripe.refund(topup["id"], 4), *stripe.refund(topup["id"], 6)]
    events *= 2
    rng.shuffle(events)
    assert set(await asyncio.gather(*(told(shop, event) for event in events))) <= {204, 503}
    for event in events:  # as Stripe sends again what was answered with 503
        assert await told(shop, event) == 204
    assert {await status(shop, buyer(org_id), t["id"]) for t in topups} == {"paid"}
    assert await sums(ledger, org_id) == (len(topups) * 15 * CENT, 0)
    await ledger.verified()


async def test_a_dispute_freezes_the_wallet_and_one_that_is_won_releases_it(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    topup = await paid(shop, stripe, org_id)
    created = stripe.dispute(topup)
    for _ in range(2):
        assert await told(shop, created) == 204
    shown = (await shop.http.get(f"/api/v1/admin/billing/wallets/{org_id}", headers=signed(operator()))).json()
    assert (shown["frozen"], shown["frozen_reason"]) == (True, f"A payment is disputed: top-up {topup}")
    won = stripe.close(topup, "won")
    for event in (won, created, won):
        assert await told(shop, event) == 204
    assert not (await ledger.wallet(org_id)).is_frozen
    assert await sums(ledger, org_id) == (CREDITS, 0)


async def test_a_dispute_that_is_lost_takes_the_credits_and_the_wallet_stays_frozen(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    topup = await paid(shop, stripe, org_id)
    assert await told(shop, stripe.dispute(topup)) == 204
    assert await told(shop, stripe.close(topup, "lost")) == 204
    assert await sums(ledger, org_id) == (0, 0)
    assert (await ledger.wallet(org_id)).is_frozen
    await ledger.verified()


async def test_what_an_operator_or_another_dispute_has_frozen_stays_frozen(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    topup = await paid(shop, stripe, org_id)
    other = await paid(shop, stripe, org_id)
    await told(shop, stripe.dispute(topup))
    await told(shop, stripe.dispute(other))
    await told(shop, stripe.close(other, "won"))
    assert (await ledger.wallet(org_id)).is_frozen
    path = f"/api/v1/admin/billing/wallets/{org_id}"
    for frozen in (False, True):
        body = {"frozen": frozen, "reason": "looked into"}
        answer = await shop.http.put(f"{path}/freeze", json=body, headers=signed(operator(), **key()))
        assert answer.status_code == 200
    await told(shop, stripe.close(topup, "won"))
    assert (await ledger.wallet(org_id)).is_frozen
    audit = (await shop.http.get(f"{path}/audit", headers=signed(operator()))).json()["data"]
    assert [(a["kind"], a["frozen"]) for a in audit] == [("freeze", f) for f in (True, False, True, True)]
    assert [a["actor"].split(":")[0] for a in audit] == ["key", "key", "payments", "payments"]


async def test_money_of_other_payments_is_none_of_ours(shop: App, stripe: StripeDouble) -> None:
    for thing in ({"payment_intent": "pi_unknown"}, {"payment_intent": None}, {}):
        assert await told(shop, stripe.event("charge.refunded", {"id": "ch_1", **thing})) == 204


async def test_taking_back_is_of_a_total_and_no_refund_undoes_it(ledger: Ledger, org_id: UUID) -> None:
    credit = grant(org_id, 100)
    await ledger.writer.submit(credit)
    for total, expected in ((30, (30, 30)), (20, (0, 30)), (100, (70, 100)), (30, (30, 30))):
        operation = TakeBack(org_id, org_id, f"reversal:{total}", "payments:test", credit.account_id, total, "test")
        result = await ledger.writer.submit(operation)
        assert isinstance(result, TakenBack)
        assert (result.amount, result.total) == expected
    refund = Refund(org_id, org_id, f"key:{uuid4()}", "user:test", credit.account_id, uuid7(), None, "test")
    with pytest.raises(NothingToRefund):
        await ledger.writer.submit(refund)
    assert await sums(ledger, org_id) == (0, 0)
    await ledger.verified()
