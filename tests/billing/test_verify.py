"""`verify` finds what does not add up, and says nothing otherwise."""

from __future__ import annotations

import asyncio
import json
from uuid import UUID, uuid4

import pytest
from typer.testing import CliRunner

from services.billing.cli import app
from services.billing.domain import DEFAULT_CLASS, PriceTerms
from services.billing.ledger.operations import Charge, ExtendHold
from services.billing.repository.checks import CHECKS, STRANGERS
from services.billing.repository.verification import examine
from services.billing.tables.ledger import APPEND_ONLY
from shared.ids import uuid7
from tests.billing.harness import Ledger, owner, place, settle

# Each as somebody would do it who can switch the guards off; and the check that must notice.
TAMPERING = {
    "transfers are numbered without a gap": "UPDATE billing.wallet SET seq = seq + 1",
    "accounts equal their transfers": "UPDATE billing.account SET credits_posted = credits_posted + 7 WHERE limited",
    "debits equal credits": "UPDATE billing.account SET debits_posted = debits_posted + 1 WHERE kind = 'revenue'",
    "what is pending equals the slices of open holds": "UPDATE billing.account SET debits_pending = 0",
    "transfers are in order of time": (
        "UPDATE billing.transfer SET booked_at = booked_at + interval '1 h' WHERE wallet_seq = 1"
    ),
    "transfers stay within their wallet": (
        "UPDATE billing.transfer t SET debit_account = "
        "(SELECT id FROM billing.account a WHERE a.wallet_id <> t.wallet_id LIMIT 1)"
    ),
    "balances follow from the transfers": "UPDATE billing.transfer SET balance_after = balance_after + 1",
    "transfers belong to operations that were applied": "UPDATE billing.op SET refusal = 'insufficient_quota'",
    "usage by day equals the transfers of usage": "UPDATE billing.usage_day SET cost = cost + 1",
    "charges by day equal the transfers of charges": "UPDATE billing.charge_day SET amount = amount + 1",
    "what belongs to a hold has one": "DELETE FROM billing.hold",
    "holds are covered by their slices": "DELETE FROM billing.hold_slice",
    "holds cost what their price says": "UPDATE billing.hold SET output_tokens = output_tokens + 1",
    "holds are open or resolved": "DELETE FROM billing.open_hold",
    "usage costs what its price says": "UPDATE billing.price SET output = output + 1000000",
    "usage is paid or owed": "UPDATE billing.usage SET cost = cost + 1",
    "resolutions say what was taken": "UPDATE billing.hold_resolution SET amount = amount + 1",
    "settled holds have usage, voided ones have none": "DELETE FROM billing.usage",
    "holds and resolutions are remembered as they were decided": (
        "UPDATE billing.op SET result = jsonb_set(result, '{amount}', '1') WHERE kind = 'hold'"
    ),
    "who owes has nothing available": (
        "UPDATE billing.account SET debits_posted = credits_posted + 5 WHERE kind = 'receivable'"
    ),
}


# And of extensions: what only they can have wrong.
EXTENSIONS = {
    "what belongs to a hold has one": "INSERT INTO billing.hold_extension VALUES (uuidv7(), 1, uuidv7(), 9, 9, now())",
    "holds are covered by their slices": "DELETE FROM billing.hold_extension",
    "holds cost what their price says": "UPDATE billing.hold_extension SET output_tokens = output_tokens + 1",
    "holds and resolutions are remembered as they were decided": (
        "UPDATE billing.op SET refusal = 'insufficient_quota' WHERE kind = 'extend'"
    ),
}


async def some_history(ledger: Ledger, org_id: UUID) -> None:
    held = await ledger.held(org_id, 200)
    await ledger.writer.submit(ExtendHold(org_id, held.hold_id, 1, 300))
    await ledger.writer.submit(settle(org_id, held.hold_id, 120))
    await ledger.writer.submit(place(org_id, 40))
    await ledger.writer.submit(Charge(org_id, org_id, f"key:{uuid4()}", "user:test", uuid7(), 7, "test", uuid4()))


async def test_transfers_of_a_wallet_that_is_not_there_are_noticed(ledger: Ledger, org_id: UUID) -> None:
    await some_history(ledger, org_id)
    connection = await owner(ledger.owner_url)
    tampering = connection.transaction()
    await tampering.start()
    try:
        await connection.execute("ALTER TABLE billing.transfer DISABLE TRIGGER USER")
        await connection.execute("UPDATE billing.transfer SET wallet_id = uuidv7() WHERE wallet_id = $1", org_id)
        report = await examine(connection)
    finally:
        await tampering.rollback()
        await connection.close()
    assert report.found[STRANGERS] == await ledger.pool.fetchval("SELECT seq FROM billing.wallet WHERE id = $1", org_id)


@pytest.mark.parametrize(("check", "tampering_with"), [*TAMPERING.items(), *EXTENSIONS.items()])
async def test_every_check_notices_what_it_is_for(
    ledger: Ledger, org_id: UUID, check: str, tampering_with: str
) -> None:
    assert set(CHECKS) == set(TAMPERING)
    await some_history(ledger, org_id)
    await some_history(ledger, uuid4())
    await ledger.verified()
    connection = await owner(ledger.owner_url)
    tampering = connection.transaction()
    await tampering.start()
    try:
        for table in (*APPEND_ONLY, "wallet", "account", "price"):
            await connection.execute(f"ALTER TABLE billing.{table} DISABLE TRIGGER USER")
        await connection.execute(tampering_with)
        report = await examine(connection)
    finally:
        await tampering.rollback()
        await connection.close()
    assert not report.is_clean
    assert check in {d.check for d in report.differences}
    assert any("DIFFERS" in line and check in line for line in report.lines())


async def test_a_late_settlement_of_no_tokens_adds_up(ledger: Ledger, org_id: UUID) -> None:
    terms = PriceTerms(per_request=5, input=0, cached_input=0, output=0)
    await ledger.prices.bring_up_to_date("per-request", DEFAULT_CLASS, terms, "test")
    held = await ledger.held(org_id, 1, model="per-request")
    await ledger.expire_now(held.hold_id)
    await ledger.sweeper.sweep()
    await ledger.writer.submit(settle(org_id, held.hold_id, 0))
    assert (await ledger.wallet(org_id)).spent == 5
    await ledger.verified()


async def test_one_request_and_one_wallet_are_shown_and_checked(
    ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some_history(ledger, org_id)
    held = await ledger.held(org_id, 60)
    await ledger.writer.submit(ExtendHold(org_id, held.hold_id, 1, 70))
    await ledger.writer.submit(settle(org_id, held.hold_id, 25))
    monkeypatch.setenv("TOLLGATE_BILLING_DATABASE_URL", ledger.url)
    run = CliRunner().invoke
    shown = await asyncio.to_thread(run, app, ["show", str(held.hold_id)])
    request = json.loads(shown.output)
    assert shown.exit_code == 0
    assert [u["cost"] for u in request["usage"]] == [25]
    assert sum(t["amount"] for t in request["transfers"]) == 25
    assert {o["kind"] for o in request["operations"]} == {"hold", "extend", "settle"}
    assert [e["amount"] for e in request["extensions"]] == [10]
    assert request["price"]["output"] == 1_000_000
    assert request["differences"] == []
    assert (await asyncio.to_thread(run, app, ["show", str(uuid4())])).exit_code == 2
    one = await asyncio.to_thread(run, app, ["verify", "--wallet", str(org_id)])
    assert (one.exit_code, one.output.startswith("1 wallets, ")) == (0, True)
    await ledger.pool.execute("UPDATE billing.wallet SET seq = seq + 1 WHERE id = $1", org_id)
    broken = await asyncio.to_thread(run, app, ["verify", "--wallet", str(org_id)])
    await ledger.pool.execute("UPDATE billing.wallet SET seq = seq - 1 WHERE id = $1", org_id)
    assert broken.exit_code == 1
    none = await asyncio.to_thread(run, app, ["verify", "--wallet", str(uuid4())])
    assert none.output.startswith("0 wallets, ")


async def test_the_command_exits_1_when_something_differs_and_0_otherwise(
    ledger: Ledger, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some_history(ledger, org_id)
    monkeypatch.setenv("TOLLGATE_BILLING_DATABASE_URL", ledger.url)
    run = CliRunner().invoke
    clean = await asyncio.to_thread(run, app, ["verify"])
    assert (clean.exit_code, "no difference" in clean.output) == (0, True)
    await ledger.pool.execute("UPDATE billing.wallet SET seq = seq + 1 WHERE id = $1", org_id)
    broken = await asyncio.to_thread(run, app, ["verify"])
    as_json = await asyncio.to_thread(run, app, ["verify", "--json"])
    await ledger.pool.execute("UPDATE billing.wallet SET seq = seq - 1 WHERE id = $1", org_id)
    assert (broken.exit_code, as_json.exit_code) == (1, 1)
    told = json.loads(as_json.output)
    assert (told["clean"], told["found"]) == (False, {"transfers are numbered without a gap": 1})
    assert told["differences"][0]["wallet_id"] == str(org_id)
    assert f"DIFFERS  transfers are numbered without a gap: wallet {org_id}" in broken.output
