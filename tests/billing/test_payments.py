"""Top-ups: never credited twice, never lost, whatever the provider's answers and webhooks do."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from pydantic import SecretStr

from shared.identity import Identity
from tests.billing.harness import App, Ledger, operator, person, running, signed, wait_until
from tests.billing.stripe_double import SECRET_KEY, WEBHOOK_SECRET, StripeDouble, signed_event, stripe_double

TOPUPS = "/api/v1/billing/topups"
WEBHOOK = "/api/v1/billing/payments/stripe/webhook"
MANUAL = "/api/v1/admin/billing/topups"
CREDITS = 25 * 10**9


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


def buyer(org_id: UUID) -> Identity:
    return Identity(kind="user", org_id=str(org_id), user_id=str(uuid4()), scopes=("billing:read", "billing:write"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stripe() -> AsyncIterator[StripeDouble]:
    async with stripe_double() as double:
        yield double


@asynccontextmanager
async def selling(owner_url: str, stripe: StripeDouble, timeout_s: float) -> AsyncIterator[App]:
    """The service with Stripe configured."""
    async with running(
        owner_url,
        signup_credits="0",
        stripe_secret_key=SecretStr(SECRET_KEY),
        stripe_webhook_secret=SecretStr(WEBHOOK_SECRET),
        stripe_api_url=stripe.url,
        stripe_timeout_s=timeout_s,
        stripe_retries_max=0,
        topup_price_minor="1",
        topup_credits_min="1",
        billing_topup_watch_interval_s=0.05,
        billing_topup_unchecked_s=0.1,
    ) as app:
        yield app


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(owner_url: str, ledger: Ledger, stripe: StripeDouble) -> AsyncIterator[App]:
    async with selling(owner_url, stripe, timeout_s=30) as app:
        yield app


async def ordered(shop: App, who: Identity, **headers: str) -> dict[str, Any]:
    answer = await shop.http.post(TOPUPS, json={"credits": "25"}, headers=signed(who, **(headers or key())))
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def told(shop: App, event: dict[str, Any], **changes: Any) -> int:
    payload, headers = signed_event(event, **changes)
    answer = await shop.http.post(WEBHOOK, content=payload, headers=signed(Identity(kind="anonymous"), **headers))
    return answer.status_code


async def status(shop: App, who: Identity, topup_id: str) -> str:
    answer = (await shop.http.get(f"{TOPUPS}/{topup_id}", headers=signed(who))).json()
    return str(answer["status"])


async def test_a_top_up_is_credited_when_the_provider_says_that_it_is_paid(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who = buyer(org_id)
    topup = await ordered(shop, who)
    assert (topup["status"], topup["credits"], topup["currency"], topup["money"]) == ("pending", "25.00", "usd", 25)
    assert topup["checkout_url"] == stripe.of(topup["id"])["url"]
    assert (await ledger.wallet(org_id)).balance == 0
    assert await told(shop, stripe.pay(topup["id"])) == 204
    assert await status(shop, who, topup["id"]) == "paid"
    assert (await ledger.wallet(org_id)).balance == CREDITS
    listed = (await shop.http.get(TOPUPS, headers=signed(who))).json()
    assert [(t["id"], t["status"], t["checkout_url"]) for t in listed["data"]] == [(topup["id"], "paid", None)]
    await ledger.verified()


async def test_a_provider_that_times_out_after_it_succeeded_has_one_session(
    shop: App, ledger: Ledger, owner_url: str, stripe: StripeDouble, org_id: UUID
) -> None:
    who, headers = buyer(org_id), key()
    stripe.hang_after_success = 1
    async with selling(owner_url, stripe, timeout_s=1) as impatient:
        while stripe.hang_after_success:  # until it has arrived
            lost = await impatient.http.post(TOPUPS, json={"credits": "25"}, headers=signed(who, **headers))
            assert (lost.status_code, lost.json()["code"]) == (503, "payment_provider_unavailable")
            assert lost.headers["retry-after"]
    again = await ordered(shop, who, **headers)
    assert again["checkout_url"] == stripe.of(again["id"])["url"]
    assert stripe.requests.count(again["id"]) > 1
    await told(shop, stripe.pay(again["id"]))
    assert (await ledger.wallet(org_id)).balance == CREDITS


async def test_what_the_customer_gave_up_on_is_opened_and_settled_by_itself(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    """The order timed out, nobody retries, and every webhook is lost."""
    who = buyer(org_id)
    stripe.fail_next = 1
    assert (await shop.http.post(TOPUPS, json={"credits": "25"}, headers=signed(who, **key()))).status_code == 503
    watching = asyncio.create_task(shop.tasks["topups"]())
    try:

        async def opened() -> bool:
            [topup] = (await shop.http.get(TOPUPS, headers=signed(who))).json()["data"]
            return topup["checkout_url"] is not None

        await wait_until(opened, "the session")
        [topup] = (await shop.http.get(TOPUPS, headers=signed(who))).json()["data"]
        stripe.pay(topup["id"])

        async def paid() -> bool:
            return await status(shop, who, topup["id"]) == "paid"

        await wait_until(paid, "the credit")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert (await ledger.wallet(org_id)).balance == CREDITS


@pytest.mark.parametrize("seed", range(3))
async def test_webhooks_in_any_order_and_number_credit_once(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID, seed: int
) -> None:
    who, rng = buyer(org_id), random.Random(seed)
    topups = [await ordered(shop, who) for _ in range(4)]
    events = list(itertools.chain.from_iterable((stripe.expire(t["id"]), stripe.pay(t["id"])) for t in topups)) * 3
    rng.shuffle(events)
    assert set(await asyncio.gather(*(told(shop, event) for event in events))) == {204}
    assert (await ledger.wallet(org_id)).balance == len(topups) * CREDITS
    assert {await status(shop, who, t["id"]) for t in topups} == {"paid"}
    stored = await ledger.pool.fetch("SELECT DISTINCT status FROM billing.topup WHERE wallet_id = $1", org_id)
    assert [row[0] for row in stored] == ["paid"]
    assert 'tollgate_billing_topups_total{outcome="paid",provider="stripe"}' in (await shop.http.get("/metrics")).text
    await ledger.verified()


async def test_a_crash_between_credit_and_mark_shows_as_paid_and_is_made_good(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who = buyer(org_id)
    topup = await ordered(shop, who)
    await told(shop, stripe.pay(topup["id"]))
    unmark = "UPDATE billing.topup SET status = 'pending', grant_account_id = NULL WHERE id = $1"
    await ledger.pool.execute(unmark, UUID(topup["id"]))
    assert await status(shop, who, topup["id"]) == "paid"
    watching = asyncio.create_task(shop.tasks["topups"]())
    try:

        async def marked() -> bool:
            stored = "SELECT status = 'paid' FROM billing.topup WHERE id = $1"
            return bool(await ledger.pool.fetchval(stored, UUID(topup["id"])))

        await wait_until(marked, "the mark")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert (await ledger.wallet(org_id)).balance == CREDITS


async def test_the_same_order_twice_at_once_is_one_top_up(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who, headers = buyer(org_id), key()
    answers = await asyncio.gather(*(ordered(shop, who, **headers) for _ in range(8)))
    assert len({a["id"] for a in answers}) == 1
    assert len({a["checkout_url"] for a in answers}) == 1
    other = await shop.http.post(TOPUPS, json={"credits": "26"}, headers=signed(who, **headers))
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


async def test_a_session_that_expires_fails_and_a_payment_that_comes_later_still_counts(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who = buyer(org_id)
    topup = await ordered(shop, who)
    await told(shop, stripe.expire(topup["id"]))
    assert await status(shop, who, topup["id"]) == "failed"
    await told(shop, stripe.pay(topup["id"]))
    assert await status(shop, who, topup["id"]) == "paid"
    assert (await ledger.wallet(org_id)).balance == CREDITS


async def test_a_payment_of_another_amount_or_currency_credits_nothing(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who = buyer(org_id)
    for change in ({"amount_total": 1}, {"currency": "jpy"}):
        topup = await ordered(shop, who)
        event = stripe.pay(topup["id"])
        event["data"]["object"] |= change
        assert await told(shop, event) == 204
        assert await status(shop, who, topup["id"]) == "failed"
    assert (await ledger.wallet(org_id)).balance == 0


async def test_a_webhook_without_a_valid_signature_changes_nothing(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who = buyer(org_id)
    topup = await ordered(shop, who)
    event = stripe.pay(topup["id"])
    assert await told(shop, event, secret="whsec_guessed") == 400
    assert await told(shop, event, age_s=3_600) == 400
    payload, headers = signed_event(event)
    anonymous = signed(Identity(kind="anonymous"), **headers)
    for body in (payload + b" ", b"\xff", b""):
        assert (await shop.http.post(WEBHOOK, content=body, headers=anonymous)).status_code == 400
    assert (await shop.http.post(WEBHOOK, content=payload, headers=headers)).status_code == 401, "not by the gateway"
    assert await status(shop, who, topup["id"]) == "pending"


async def test_webhooks_about_other_things_are_taken_and_ignored(shop: App, stripe: StripeDouble) -> None:
    foreign = {"id": "cs_1", "client_reference_id": str(uuid4()), "payment_status": "paid", "status": "complete"}
    nameless = {"id": "cs_2", "client_reference_id": None, "payment_status": "paid"}
    for kind, thing in (
        ("checkout.session.completed", foreign),
        ("checkout.session.completed", nameless),
        ("customer.created", {"id": "cus_1"}),
    ):
        assert await told(shop, stripe.event(kind, thing)) == 204


async def test_delayed_payments_are_open_until_they_succeed_or_fail(
    shop: App, ledger: Ledger, stripe: StripeDouble, org_id: UUID
) -> None:
    who = buyer(org_id)
    good, bad = await ordered(shop, who), await ordered(shop, who)
    for topup in (good, bad):
        unpaid = stripe.of(topup["id"]) | {"status": "complete", "payment_status": "unpaid"}
        await told(shop, stripe.event("checkout.session.completed", unpaid))
        assert await status(shop, who, topup["id"]) == "pending"
    await told(shop, stripe.event("checkout.session.async_payment_failed", stripe.of(bad["id"])))
    paid = stripe.pay(good["id"]) | {"type": "checkout.session.async_payment_succeeded"}
    await told(shop, paid)
    assert (await status(shop, who, good["id"]), await status(shop, who, bad["id"])) == ("paid", "failed")
    assert (await ledger.wallet(org_id)).balance == CREDITS


async def test_nobody_sees_or_pays_into_another_organisations_top_ups(shop: App, org_id: UUID) -> None:
    topup = await ordered(shop, buyer(org_id))
    stranger = await shop.http.get(f"{TOPUPS}/{topup['id']}", headers=signed(buyer(uuid4())))
    assert (stranger.status_code, stranger.json()["code"]) == (404, "topup_not_found")
    reader = await shop.http.post(TOPUPS, json={"credits": "25"}, headers=signed(person(org_id), **key()))
    assert reader.status_code == 403


@pytest.mark.parametrize("amount", ["0.5", "1000001", "1.000000001", "0", "-1"])
async def test_amounts_beyond_the_limits_or_of_fractions_are_refused(shop: App, org_id: UUID, amount: str) -> None:
    answer = await shop.http.post(TOPUPS, json={"credits": amount}, headers=signed(buyer(org_id), **key()))
    assert (answer.status_code, answer.json()["param"]) == (400, "credits")


async def test_an_operator_credits_a_bank_transfer_once(shop: App, ledger: Ledger, org_id: UUID) -> None:
    reference, headers = f"SEPA {uuid4()}", signed(operator(), **key())
    body = {"org_id": str(org_id), "credits": "25", "reference": reference}
    first = await shop.http.post(MANUAL, json=body, headers=headers)
    again = await shop.http.post(MANUAL, json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert (first.json()["id"], first.json()["status"]) == (again.json()["id"], "paid")
    rivals = [shop.http.post(MANUAL, json=body, headers=signed(operator(), **key())) for _ in range(3)]
    codes = {(a.status_code, a.json()["code"]) for a in await asyncio.gather(*rivals)}
    assert codes == {(409, "reference_used")}
    assert (await ledger.wallet(org_id)).balance == CREDITS
    refused = await shop.http.post(MANUAL, json=body, headers=signed(buyer(org_id), **key()))
    assert refused.status_code == 403


async def test_without_a_provider_nothing_is_sold(app: App, org_id: UUID) -> None:
    answer = await app.http.post(TOPUPS, json={"credits": "100"}, headers=signed(buyer(org_id), **key()))
    assert (answer.status_code, answer.json()["code"]) == (404, "payments_not_offered")
