"""Refunds, freezes, charges and the plain calls: over HTTP to the ledger and back, once a key."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from services.billing.repository import history as history_repository
from shared.identity import Identity
from tests.billing.harness import MODEL, App, Ledger, grant, operator, person, place, settle, signed

SUMMARY = "/api/v1/billing/usage/summary"


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


def owner(org_id: UUID) -> Identity:
    return Identity(kind="user", org_id=str(org_id), user_id=str(uuid4()), scopes=("billing:read", "billing:write"))


def admin(org_id: UUID, path: str) -> str:
    return f"/api/v1/admin/billing/wallets/{org_id}/{path}"


async def used(ledger: Ledger, org_id: UUID, tokens: int, **changes: Any) -> UUID:
    placed = place(org_id, tokens, **changes)
    await ledger.writer.submit(placed)
    await ledger.writer.submit(settle(org_id, placed.hold_id, tokens))
    return placed.hold_id


async def test_an_operator_refunds_a_request_in_parts_and_never_more(app: App, ledger: Ledger, org_id: UUID) -> None:
    hold_id = await used(ledger, org_id, 300)
    body, headers = {"source_id": str(hold_id), "credits": "0.0000001", "reason": "outage"}, signed(operator(), **key())
    first = await app.http.post(admin(org_id, "refunds"), json=body, headers=headers)
    again = await app.http.post(admin(org_id, "refunds"), json=body, headers=headers)
    assert (first.status_code, first.json()) == (201, again.json())
    assert (first.json()["credits"], first.json()["refundable"]) == ("0.0000001", "0.0000002")
    more = await app.http.post(
        admin(org_id, "refunds"), json=body | {"credits": "0.0000003"}, headers=signed(operator(), **key())
    )
    assert (more.status_code, more.json()["code"]) == (422, "refund_too_large")
    del body["credits"]
    rest = await app.http.post(admin(org_id, "refunds"), json=body, headers=signed(operator(), **key()))
    assert (rest.json()["credits"], rest.json()["refundable"]) == ("0.0000002", "0.00")
    none = await app.http.post(admin(org_id, "refunds"), json=body, headers=signed(operator(), **key()))
    assert (none.status_code, none.json()["code"]) == (404, "nothing_to_refund")
    wallet = await ledger.wallet(org_id)
    assert (wallet.balance, wallet.spent) == (1_000, 0)
    page = (await app.http.get("/api/v1/billing/transactions", headers=signed(person(org_id)))).json()["data"]
    assert [(t["kind"], t["amount"]) for t in page[:2]] == [("refund", "0.0000002"), ("refund", "0.0000001")]
    await ledger.verified()


async def test_a_frozen_wallet_refuses_requests_until_it_is_released(app: App, ledger: Ledger, org_id: UUID) -> None:
    await used(ledger, org_id, 5)
    for frozen in (True, False):
        body = {"frozen": frozen, "reason": "card stolen"}
        answer = await app.http.put(admin(org_id, "freeze"), json=body, headers=signed(operator(), **key()))
        assert (answer.status_code, answer.json()["frozen"]) == (200, frozen)
        wallet = (await app.http.get("/api/v1/billing/wallet", headers=signed(person(org_id)))).json()
        assert wallet["frozen"] is frozen
        charge = await app.http.post(
            "/billing/charge",
            json={"amount": "0.000000001", "description": "x"},
            headers=signed(owner(org_id), **key()),
        )
        assert charge.status_code == (403 if frozen else 201)
    unknown = await app.http.put(
        admin(uuid4(), "freeze"), json={"frozen": True, "reason": "x"}, headers=signed(operator(), **key())
    )
    assert unknown.status_code == 404


@pytest.mark.parametrize(("method", "path"), [("POST", "refunds"), ("PUT", "freeze")])
async def test_only_operators_refund_and_freeze_and_only_with_a_key(
    app: App, org_id: UUID, method: str, path: str
) -> None:
    body = {"source_id": str(uuid4()), "reason": "x"} if path == "refunds" else {"frozen": True, "reason": "x"}
    for headers, status in ((signed(owner(org_id), **key()), 403), (signed(operator()), 400)):
        answer = await app.http.request(method, admin(org_id, path), json=body, headers=headers)
        assert answer.status_code == status


async def test_of_many_charges_at_once_as_many_succeed_as_there_are_credits_for(
    app: App, ledger: Ledger, org_id: UUID
) -> None:
    await ledger.writer.submit(grant(org_id, 10 * 10**9))
    who = owner(org_id)

    async def charge(headers: dict[str, str]) -> Any:
        body = {"amount": "1", "description": "a picture"}
        return await app.http.post("/billing/charge", json=body, headers=signed(who, **headers))

    answers = await asyncio.gather(*(charge(key()) for _ in range(25)))
    assert sorted(a.status_code for a in answers) == [201] * 10 + [402] * 15
    same = key()
    await app.http.post("/billing/add", json={"amount": "5", "description": "x"}, headers=signed(operator(), **key()))
    await ledger.writer.submit(grant(org_id, 3 * 10**9))
    again = await asyncio.gather(*(charge(same) for _ in range(5)))
    assert len({a.text for a in again}) == 1
    assert (await ledger.wallet(org_id)).balance == 2 * 10**9
    await ledger.verified()


async def test_the_plain_calls_tell_one_story(app: App, ledger: Ledger, org_id: UUID) -> None:
    who, boss = owner(org_id), signed(operator())

    async def post(path: str, headers: dict[str, str], **body: Any) -> Any:
        answer = await app.http.post(f"/billing/{path}", json=body, headers={**headers, **key()})
        assert answer.status_code == 201, answer.text
        return answer.json()

    added = await post("add", boss, amount="10", description="welcome", org_id=str(org_id))
    assert (added["success"], added["amount"], added["remaining_credits"]) == (True, "10.00", "10.00")
    charged = await post("charge", signed(who), amount="3", description="4B model, one message")
    assert (charged["amount"], charged["remaining_credits"]) == ("3.00", "7.00")
    refunded = await post("refund", boss, charge_id=charged["id"], amount="1.5", description="half", org_id=str(org_id))
    assert (refunded["amount"], refunded["remaining_credits"]) == ("1.50", "8.50")
    balance = (await app.http.get("/billing/balance", headers=signed(person(org_id)))).json()
    assert (balance["success"], balance["currency"]) == (True, "credits")
    listed = (await app.http.get("/billing/transactions", headers=signed(who))).json()["transactions"]
    assert [(t["type"], t["amount"]) for t in listed[-3:]] == [("add", "1.50"), ("charge", "-3.00"), ("add", "10.00")]
    summary = (await app.http.get("/billing/summary", headers=signed(who))).json()
    assert (summary["total_charged"], summary["models"]) == ("1.50", [])
    refused = await app.http.post(
        "/billing/add", json={"amount": "1", "description": "me"}, headers=signed(who, **key())
    )
    assert refused.status_code == 403
    await ledger.verified()


async def test_usage_is_summed_by_day_model_key_and_member_from_the_ledgers_own_sums(
    app: App, ledger: Ledger, org_id: UUID
) -> None:
    ada, bob, one, two = (uuid4() for _ in range(4))
    for user_id, key_id, tokens in ((ada, one, 10), (ada, one, 20), (ada, two, 30), (bob, None, 40)):
        await used(ledger, org_id, tokens, user_id=user_id, key_id=key_id)

    async def sums(**query: Any) -> list[dict[str, Any]]:
        answer = await app.http.get(SUMMARY, params=query, headers=signed(person(org_id)))
        assert answer.status_code == 200, answer.text
        assert not answer.json()["has_more"]
        found: list[dict[str, Any]] = answer.json()["data"]
        return found

    today = datetime.now(UTC).date()
    [day] = await sums()
    assert (day["day"], day["model"], day["requests"], day["output_tokens"]) == (today.isoformat(), None, 4, 100)
    assert day["cost"] == "0.0000001"
    by_member = await sums(group_by="member")
    assert [(s["user_id"], s["requests"], s["output_tokens"]) for s in by_member] == [
        (str(ada), 3, 60),
        (str(bob), 1, 40),
    ]
    by_key = await sums(group_by=["key", "model"])
    assert {(s["key_id"], s["model"], s["output_tokens"]) for s in by_key} == {
        (str(one), MODEL, 30),
        (str(two), MODEL, 30),
        (None, MODEL, 40),
    }
    assert (
        await sums(**{"from": (today + timedelta(days=1)).isoformat(), "to": (today + timedelta(days=2)).isoformat()})
        == []
    )
    far = await app.http.get(SUMMARY, params={"from": "2020-01-01"}, headers=signed(person(org_id)))
    assert (far.status_code, far.json()["param"]) == (400, "from")
    budgets = f"/api/v1/billing/budgets/members/{ada}"
    set_ = await app.http.put(budgets, json={"month": "1"}, headers=signed(owner(org_id), **key()))
    assert (set_.json()["spent_day"], set_.json()["spent_month"]) == ("0.00000006", "0.00000006")


async def test_the_sums_equal_the_usage_behind_them(ledger: Ledger, org_id: UUID) -> None:
    for tokens in (1, 2, 3):
        await used(ledger, org_id, tokens)
    everything = (date(2000, 1, 1), date(2100, 1, 1))
    [total] = await history_repository.usage_sums(ledger.database, org_id, *everything, (), 10)
    row = await ledger.pool.fetchrow(
        "SELECT count(*), sum(output_tokens)::int8, sum(cost)::int8 FROM billing.usage WHERE wallet_id = $1", org_id
    )
    assert (total.requests, total.output_tokens, total.cost) == tuple(row)


async def test_a_budget_set_over_http_bounds_the_next_hold(app: App, ledger: Ledger, org_id: UUID) -> None:
    member = uuid4()
    await used(ledger, org_id, 30, user_id=member)
    path = f"/api/v1/billing/budgets/members/{member}"
    assert (
        await app.http.put(path, json={"day": "0.00000005"}, headers=signed(owner(org_id), **key()))
    ).status_code == 200
    with pytest.raises(Exception, match="budget_exceeded"):
        await ledger.held(org_id, 21, user_id=member)
    assert (await ledger.held(org_id, 20, user_id=member)).amount == 20
    assert (await ledger.held(org_id, 500)).amount == 500
