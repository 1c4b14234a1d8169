"""Budgets of keys and members: who sets them, once a key, and nothing in between."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from services.billing.errors import BudgetExceeded
from services.billing.service import budgets as service
from shared.identity import Identity
from tests.billing.harness import App, Ledger, grant, operator, person, settle, signed

BUDGETS = "/api/v1/billing/budgets"
SOMEBODY = UUID(int=7)
NOTHING_SPENT = {"spent_day": "0.00", "spent_month": "0.00"}


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


def owner(org_id: UUID) -> Identity:
    return Identity(kind="user", org_id=str(org_id), user_id=str(uuid4()), scopes=("billing:read", "billing:write"))


async def listed(app: App, identity: Identity) -> Any:
    return (await app.http.get(BUDGETS, headers=signed(identity))).json()["data"]


async def test_a_budget_is_set_replaced_and_removed(app: App, org_id: UUID) -> None:
    who, member = owner(org_id), uuid4()
    path = f"{BUDGETS}/members/{member}"
    for body, day, month in (
        ({"day": "1.5", "month": "20"}, "1.50", "20.00"),
        ({"month": "0"}, None, "0.00"),
    ):
        answer = await app.http.put(path, json=body, headers=signed(who, **key()))
        expected = {"subject": "member", "id": str(member), "day": day, "month": month, **NOTHING_SPENT}
        assert (answer.status_code, answer.json()) == (200, expected)
        assert await listed(app, who) == [expected]
    await app.http.put(path, json={}, headers=signed(who, **key()))
    assert await listed(app, who) == []


async def test_the_same_key_sets_once_and_another_body_is_refused(app: App, ledger: Ledger, org_id: UUID) -> None:
    who, path = owner(org_id), f"{BUDGETS}/keys/{uuid4()}"
    headers = signed(who, **key())
    bodies = [{"day": str(n // 5 + 1)} for n in range(10)]
    answers = await asyncio.gather(*(app.http.put(path, json=body, headers=headers) for body in bodies))
    first = [a.json()["day"] for a in answers if a.status_code == 200]
    assert len(first) == 5
    assert len(set(first)) == 1
    assert {(a.status_code, a.json()["code"]) for a in answers if a.status_code != 200} == {
        (422, "idempotency_mismatch")
    }
    assert (await listed(app, who))[0]["day"] == first[0]
    later = await app.http.put(path, json={"day": "9"}, headers=signed(who, **key()))
    assert later.status_code == 200
    again = await app.http.put(path, json={"day": str(int(float(first[0])))}, headers=headers)
    assert again.status_code == 200
    assert (await listed(app, who))[0]["day"] == "9.00", "an old request that comes again changes nothing"


async def test_who_waits_for_the_same_key_gets_the_result_of_the_first(app: App, ledger: Ledger, org_id: UUID) -> None:
    who, path, idem = owner(org_id), f"{BUDGETS}/keys/{uuid4()}", key()
    await app.http.get("/api/v1/billing/wallet", headers=signed(who))
    async with ledger.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{org_id}:key:{idem['Idempotency-Key']}"
        )
        waiting = [
            asyncio.create_task(app.http.put(path, json={"day": "1"}, headers=signed(who, **idem))) for _ in range(3)
        ]
        done, _ = await asyncio.wait(waiting, timeout=0.5)
        assert not done
    answers = await asyncio.gather(*waiting)
    assert [a.status_code for a in answers] == [200] * 3
    assert (
        await ledger.pool.fetchval("SELECT count(*) FROM billing.op WHERE kind = 'budget' AND tenant = $1", org_id) == 1
    )


async def test_budgets_need_the_scope_and_an_idempotency_key(app: App, org_id: UUID) -> None:
    path = f"{BUDGETS}/keys/{uuid4()}"
    cases: list[tuple[dict[str, str], int]] = [
        ({}, 401),
        (signed(person(org_id), **key()), 403),
        (signed(owner(org_id)), 400),
    ]
    for headers, status in cases:
        assert (await app.http.put(path, json={"day": "1"}, headers=headers)).status_code == status


async def test_a_key_does_not_lift_its_own_budget(app: App, org_id: UUID) -> None:
    who = person(org_id, scopes=("billing:read", "billing:write"))
    refused = await app.http.put(f"{BUDGETS}/keys/{who.key_id}", json={}, headers=signed(who, **key()))
    assert (refused.status_code, refused.json()["code"]) == (403, "own_budget")
    mine = await app.http.put(f"{BUDGETS}/members/{who.user_id}", json={}, headers=signed(who, **key()))
    assert (mine.status_code, mine.json()["code"]) == (403, "own_budget")


async def test_a_wallet_has_so_many_budgets_and_no_more(
    app: App, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BUDGETS_MAX", 3)
    who, paths = owner(org_id), [f"{BUDGETS}/keys/{uuid4()}" for _ in range(6)]
    answers = await asyncio.gather(
        *(app.http.put(path, json={"day": "1"}, headers=signed(who, **key())) for path in paths)
    )
    assert sorted(a.status_code for a in answers) == [200] * 3 + [409] * 3
    assert {a.json()["code"] for a in answers if a.status_code == 409} == {"too_many_budgets"}
    assert len(await listed(app, who)) == 3
    there = next(path for path, answer in zip(paths, answers, strict=True) if answer.status_code == 200)
    for body, status in (({"day": "2", "month": "3"}, 409), ({"day": "2"}, 200), ({}, 200), ({"month": "3"}, 200)):
        assert (await app.http.put(there, json=body, headers=signed(who, **key()))).status_code == status, body


async def test_what_was_spent_and_is_held_counts_for_budgets_that_come_later(
    app: App, ledger: Ledger, org_id: UUID
) -> None:
    """The key is used by two people, and one of them by another key too."""
    who, key_id, other_key, member, other = owner(org_id), uuid4(), uuid4(), uuid4(), uuid4()
    for by_key, by, used, held in ((key_id, member, 10, 40), (key_id, other, 20, 50), (other_key, member, 30, 60)):
        hold = await ledger.held(org_id, used, key_id=by_key, user_id=by)
        await ledger.writer.submit(settle(org_id, hold.hold_id, used))
        await ledger.held(org_id, held, key_id=by_key, user_id=by)
    for path, month in ((f"keys/{key_id}", 130), (f"members/{member}", 160)):
        body = {"month": f"0.{month:09}", "day": "1"}
        assert (await app.http.put(f"{BUDGETS}/{path}", json=body, headers=signed(who, **key()))).status_code == 200
    for subject, room in (({"key_id": key_id}, 10), ({"user_id": member}, 20)):
        clamped = await ledger.held(org_id, 100, clamp=True, **subject)
        assert clamped.output_tokens == room, subject


async def test_a_charge_is_within_the_budgets_of_its_key_and_member_and_counts_for_them(
    app: App, ledger: Ledger, org_id: UUID
) -> None:
    """Also after the books are loaded anew."""
    await ledger.writer.submit(grant(org_id, 1_000))
    who = person(org_id, scopes=("billing:read", "billing:write"))
    for path in (f"keys/{who.key_id}", f"members/{who.user_id}"):
        await app.http.put(f"{BUDGETS}/{path}", json={"day": "0.000000100"}, headers=signed(owner(org_id), **key()))

    async def charged(nano: int, by: Identity) -> tuple[int, str | None]:
        body = {"amount": f"0.{nano:09}", "description": "a picture"}
        answer = await app.http.post("/billing/charge", json=body, headers=signed(by, **key()))
        return answer.status_code, answer.json().get("code")

    assert await charged(70, who) == (201, None)
    assert await charged(31, who) == (402, "budget_exceeded")
    colleague = owner(org_id)
    assert await charged(31, colleague) == (201, None)
    await ledger.pool.execute("UPDATE billing.wallet SET version = version + 1 WHERE id = $1", org_id)
    assert await charged(31, who) == (402, "budget_exceeded")
    assert await charged(30, who) == (201, None)
    assert {b["spent_day"] for b in await listed(app, who)} == {"0.0000001"}
    hold = {"key_id": UUID(who.key_id), "user_id": UUID(who.user_id)}
    with pytest.raises(BudgetExceeded):
        await ledger.held(org_id, 1, clamp=True, **hold)
    audit = await app.http.get(f"/api/v1/admin/billing/wallets/{org_id}/audit?limit=2", headers=signed(operator()))
    assert [(a["kind"], a["credits"], a["reason"]) for a in audit.json()["data"]] == [
        ("charge", "0.00000003", "a picture"),
        ("charge", "0.000000031", "a picture"),
    ]
    path = f"/api/v1/admin/billing/wallets/{org_id}/audit?cursor={audit.json()['next_cursor']}"
    rest = (await app.http.get(path, headers=signed(operator()))).json()
    assert (len(rest["data"]), rest["next_cursor"]) == (1, None)
    await ledger.verified()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"/keys/{SOMEBODY}", {"day": "-1"}),
        (f"/keys/{SOMEBODY}", {"day": 1.5}),
        (f"/keys/{SOMEBODY}", {"week": "1"}),
        (f"/people/{SOMEBODY}", {"day": "1"}),
        ("/keys/x", {"day": "1"}),
    ],
)
async def test_budgets_that_make_no_sense_are_refused(app: App, org_id: UUID, path: str, body: dict[str, Any]) -> None:
    answer = await app.http.put(BUDGETS + path, json=body, headers=signed(owner(org_id), **key()))
    assert answer.status_code == 400
