"""The REST addresses: who may see and do what, exact decimal strings, pages, idempotency keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from shared.identity import Identity
from tests.billing.harness import MODEL, App, Ledger, operator, person, settle, signed

WALLET = "/api/v1/billing/wallet"
TRANSACTIONS = "/api/v1/billing/transactions"
USAGE = "/api/v1/billing/usage"
PRICES = "/api/v1/billing/prices"
GRANTS = "/api/v1/admin/billing/grants"
PUBLISH = "/api/v1/admin/billing/prices"


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


async def used(ledger: Ledger, org_id: UUID, *tokens: int) -> None:
    for n in tokens:
        held = await ledger.held(org_id, n)
        await ledger.writer.submit(settle(org_id, held.hold_id, n))


async def test_the_first_look_opens_the_wallet_with_its_signup_credits(app: App, org_id: UUID) -> None:
    for _ in range(2):
        answer = await app.http.get(WALLET, headers=signed(person(org_id)))
        assert answer.status_code == 200
        body = answer.json()
        created_at = body.pop("created_at")
        assert datetime.fromisoformat(created_at).tzinfo is not None
        assert body == {
            "org_id": str(org_id),
            "currency": "credits",
            "balance": "0.000001",
            "held": "0.00",
            "available": "0.000001",
            "receivable": "0.00",
            "granted": "0.000001",
            "spent": "0.00",
            "frozen": False,
            "frozen_reason": None,
        }


async def test_the_wallet_shows_exactly_what_is_held_and_spent(app: App, ledger: Ledger, org_id: UUID) -> None:
    await used(ledger, org_id, 100, 23)
    await ledger.held(org_id, 77)
    body = (await app.http.get(WALLET, headers=signed(person(org_id)))).json()
    figures = {name: body[name] for name in ("balance", "held", "available", "spent")}
    assert figures == {
        "balance": "0.000000877",
        "held": "0.000000077",
        "available": "0.0000008",
        "spent": "0.000000123",
    }


async def test_transactions_come_in_pages_newest_first(app: App, ledger: Ledger, org_id: UUID) -> None:
    await used(ledger, org_id, *range(1, 8))
    headers, seen, cursor = signed(person(org_id)), [], None
    for _ in range(10):
        query: dict[str, Any] = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = (await app.http.get(TRANSACTIONS, params=query, headers=headers)).json()
        seen += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert [t["amount"] for t in seen] == [f"-0.00000000{n}" for n in range(7, 0, -1)] + ["0.000001"]
    assert seen[0]["balance_after"] == "0.000000972"
    assert seen[0]["usage"] == {"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 7}
    assert (seen[0]["kind"], seen[0]["model"], seen[0]["build"]) == ("usage", MODEL, "chat-mini-q8_0")
    assert (seen[-1]["kind"], seen[-1]["hold_id"], seen[-1]["usage"]) == ("grant", None, None)


async def test_transactions_are_filtered_by_kind_and_time(app: App, ledger: Ledger, org_id: UUID) -> None:
    await used(ledger, org_id, 5)
    headers = signed(person(org_id))

    async def kinds(**query: Any) -> list[str]:
        answer = await app.http.get(TRANSACTIONS, params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        return [t["kind"] for t in answer.json()["data"]]

    assert await kinds(kind="grant") == ["grant"]
    assert await kinds(kind=["grant", "usage"]) == ["usage", "grant"]
    now = datetime.now(UTC)
    assert await kinds(**{"from": (now - timedelta(minutes=5)).isoformat()}) == ["usage", "grant"]
    assert await kinds(to=(now - timedelta(minutes=5)).isoformat()) == []


@pytest.mark.parametrize(
    "query",
    [
        {"kind": "theft"},
        {"cursor": "x"},
        {"cursor": "t0"},
        {"limit": 0},
        {"limit": 201},
        {"from": "yesterday"},
        {"from": "0001-01-01T00:00:00+12:00"},
        {"to": "9999-12-31T23:59:59-12:00"},
        {"cursor": "t9999999999999999999"},
        {"from": "2026-01-01T00:00:00"},
    ],
)
async def test_queries_that_make_no_sense_are_refused(app: App, org_id: UUID, query: dict[str, Any]) -> None:
    answer = await app.http.get(TRANSACTIONS, params=query, headers=signed(person(org_id)))
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"


async def test_usage_comes_in_pages_with_its_cost(app: App, ledger: Ledger, org_id: UUID) -> None:
    await used(ledger, org_id, 1, 2, 3)
    headers = signed(person(org_id))
    first = (await app.http.get(USAGE, params={"limit": 2}, headers=headers)).json()
    rest = (await app.http.get(USAGE, params={"cursor": first["next_cursor"]}, headers=headers)).json()
    rows = first["data"] + rest["data"]
    assert sorted(row["output_tokens"] for row in rows) == [1, 2, 3]
    assert {row["cost"] for row in rows} == {"0.000000001", "0.000000002", "0.000000003"}
    assert rest["next_cursor"] is None
    assert not rows[0]["late"]


async def test_prices_in_force_are_listed(app: App, org_id: UUID) -> None:
    body = (await app.http.get(PRICES, headers=signed(person(org_id)))).json()
    [price] = [p for p in body["data"] if p["model"] == MODEL]
    assert (price["output"], price["input"], price["currency"]) == ("0.001", "0.00", "credits")


@pytest.mark.parametrize("path", [WALLET, TRANSACTIONS, USAGE, PRICES])
async def test_reading_needs_an_identity_and_the_scope(app: App, org_id: UUID, path: str) -> None:
    cases: list[tuple[dict[str, str], int]] = [
        ({}, 401),
        ({"x-tollgate-identity": "v1.test.e30.x"}, 401),
        (signed(Identity(kind="anonymous")), 401),
        (signed(person(org_id, scopes=("chat",))), 403),
    ]
    for headers, status in cases:
        assert (await app.http.get(path, headers=headers)).status_code == status


async def test_nobody_sees_another_organisations_wallet(app: App, ledger: Ledger, org_id: UUID) -> None:
    await used(ledger, org_id, 5)
    stranger = signed(person())
    assert (await app.http.get(WALLET, headers=stranger)).json()["spent"] == "0.00"
    assert len((await app.http.get(TRANSACTIONS, headers=stranger)).json()["data"]) == 1
    assert (await app.http.get(USAGE, headers=stranger)).json()["data"] == []


async def test_an_operator_grants_credits_once_a_key(app: App, ledger: Ledger, org_id: UUID) -> None:
    headers = signed(operator(), **key())
    body = {"org_id": str(org_id), "credits": "2.5", "reason": "goodwill"}
    first = await app.http.post(GRANTS, json=body, headers=headers)
    again = await app.http.post(GRANTS, json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert first.json()["available"] == "2.50"
    other = await app.http.post(GRANTS, json=body | {"credits": "3"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert (await ledger.wallet(org_id)).balance == 2_500_000_000
    actor = await ledger.pool.fetchval("SELECT actor FROM billing.op WHERE kind = 'grant' AND idem_key LIKE 'key:%'")
    assert actor.startswith("key:")


async def test_a_grant_may_expire_but_not_in_the_past(app: App, org_id: UUID) -> None:
    body = {"org_id": str(org_id), "credits": "1", "reason": "trial"}
    soon, past = datetime.now(UTC) + timedelta(days=1), datetime.now(UTC) - timedelta(days=1)
    granted = await app.http.post(
        GRANTS, json=body | {"expires_at": soon.isoformat()}, headers=signed(operator(), **key())
    )
    assert granted.status_code == 201
    headers = signed(operator(), **key())
    for _ in range(2):  # refused, and the refusal remembered
        refused = await app.http.post(GRANTS, json=body | {"expires_at": past.isoformat()}, headers=headers)
        assert (refused.status_code, refused.json()["code"], refused.json()["param"]) == (
            400,
            "expiry_in_past",
            "expires_at",
        )


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": ""}, {"Idempotency-Key": "k" * 256}])
@pytest.mark.parametrize("path", [GRANTS, PUBLISH])
async def test_writing_needs_an_idempotency_key(app: App, path: str, headers: dict[str, str]) -> None:
    bodies = {
        GRANTS: {"org_id": str(uuid4()), "credits": "1", "reason": "x"},
        PUBLISH: {"model": "m", "input": "1", "cached_input": "1", "output": "1"},
    }
    answer = await app.http.post(path, json=bodies[path], headers=signed(operator(), **headers))
    assert (answer.status_code, answer.json()["code"]) == (400, "idempotency_key_required")


@pytest.mark.parametrize(
    "identity",
    [
        person(scopes=("*",)),
        person(scopes=("*",), roles=("user",)),
        person(scopes=("billing:write",), roles=("operator",)),
        Identity(
            kind="user", org_id=str(uuid4()), user_id=str(uuid4()), roles=("operator",), scopes=("billing:write",)
        ),
    ],
)
async def test_only_operators_with_the_scope_write(app: App, org_id: UUID, identity: Identity) -> None:
    body = {"org_id": str(org_id), "credits": "1", "reason": "x"}
    answer = await app.http.post(GRANTS, json=body, headers=signed(identity, **key()))
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "changes",
    [
        {"credits": "0"},
        {"credits": "-1"},
        {"credits": 1.5},
        {"credits": True},
        {"credits": "1e3"},
        {"credits": "9999999999.999999999"},
        {"credits": "0.0000000001"},
        {"credits": None},
        {"reason": ""},
        {"reason": "a\x00b"},
        {"reason": "\ud800"},
        {"expires_at": "9999-12-31T23:59:59-12:00"},
        {"expires_at": "0001-01-01T00:00:00+12:00"},
        {"org_id": "x"},
        {"expires_at": "2026-01-01"},
        {"amount": "1"},
    ],
)
async def test_grants_that_make_no_sense_are_refused(app: App, org_id: UUID, changes: dict[str, Any]) -> None:
    body = {"org_id": str(org_id), "credits": "1", "reason": "x"} | changes
    headers = signed(operator(), **key()) | {"content-type": "application/json"}
    answer = await app.http.post(GRANTS, content=json.dumps(body), headers=headers)
    assert answer.status_code == 400, answer.text


async def test_an_operator_publishes_prices_and_an_overlap_conflicts(app: App) -> None:
    body = {"model": f"m-{uuid4().hex[:6]}", "input": "1.5", "cached_input": "0.5", "output": "3"}
    headers = signed(operator(), **key())
    first = await app.http.post(PUBLISH, json=body, headers=headers)
    assert (first.status_code, first.json()["input"]) == (201, "1.50")
    assert (await app.http.post(PUBLISH, json=body, headers=headers)).json() == first.json()
    future = {"effective_from": (datetime.now(UTC) + timedelta(days=3)).isoformat()}
    assert (await app.http.post(PUBLISH, json=body | future, headers=signed(operator(), **key()))).status_code == 201
    clash = await app.http.post(PUBLISH, json=body, headers=signed(operator(), **key()))
    assert (clash.status_code, clash.json()["code"]) == (409, "price_overlap")


async def test_readiness_and_metrics_answer(app: App) -> None:
    assert (await app.http.get("/readyz")).json()["checks"] == {"postgres": "ok", "ledger": "ok"}
    assert "tollgate_billing_operations_total" in (await app.http.get("/metrics")).text
