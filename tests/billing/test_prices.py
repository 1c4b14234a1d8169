"""Price versions: one in force at a time, pinned by holds, chosen by customer class, published from a file."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from typer.testing import CliRunner

from services.billing.cli import app as cli
from services.billing.domain import PriceTerms
from services.billing.errors import IdempotencyMismatch, PriceOverlap
from services.billing.ledger import batch
from services.billing.service import Author
from shared.errors import InvalidRequest
from tests.billing.harness import Ledger, grant, place, settle

ONE = PriceTerms(0, 0, 0, 1_000_000)
TWO = PriceTerms(0, 0, 0, 2_000_000)
LATER = timedelta(days=1)


def author() -> Author:
    return Author(uuid4(), uuid4(), None, uuid4().hex)


@pytest.fixture
def model() -> str:
    return f"model-{uuid4().hex[:8]}"


@pytest.fixture(params=[batch.PRICES_AT_ONCE_MAX, 0], ids=["few prices", "too many to have them all"])
def many_or_few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that knows every price, and one that asks for those that it needs."""
    monkeypatch.setattr(batch, "PRICES_AT_ONCE_MAX", request.param)


async def versions(ledger: Ledger, model: str) -> list[Any]:
    found: list[Any] = await ledger.pool.fetch(
        """SELECT p.output, lower(p.validity) AS valid_from, upper(p.validity) AS valid_until
        FROM billing.price p JOIN billing.tariff t ON t.id = p.tariff_id WHERE t.model = $1 ORDER BY 2""",
        model,
    )
    return found


@pytest.mark.usefixtures("many_or_few")
async def test_a_new_version_ends_the_old_one_and_holds_keep_theirs(ledger: Ledger, model: str, org_id: UUID) -> None:
    old = await ledger.prices.publish(author(), model, "default", ONE, None)
    held = await ledger.held(org_id, 100, model=model)
    new = await ledger.prices.publish(author(), model, "default", TWO, None)
    first, second = await versions(ledger, model)
    assert first["valid_until"] == second["valid_from"]
    assert held.price_id == old.id
    assert (await ledger.held(org_id, 100, model=model)).price_id == new.id
    await ledger.writer.submit(settle(org_id, held.hold_id, 10))
    assert (await ledger.wallet(org_id)).spent == 10


async def test_a_version_may_be_scheduled_and_nothing_overlaps_it(ledger: Ledger, model: str, org_id: UUID) -> None:
    at = datetime.now(UTC) + LATER
    await ledger.prices.publish(author(), model, "default", ONE, None)
    await ledger.prices.publish(author(), model, "default", TWO, at)
    assert (await ledger.held(org_id, 10, model=model)).amount == 10
    for clash in (None, at - timedelta(hours=1), at):
        with pytest.raises(PriceOverlap) as refused:
            await ledger.prices.publish(author(), model, "default", ONE, clash)
        assert refused.value.status == 409
    assert [v["output"] for v in await versions(ledger, model)] == [ONE.output, TWO.output]


async def test_of_concurrent_publications_one_wins(ledger: Ledger, model: str) -> None:
    at = datetime.now(UTC) + LATER
    rivals = [ledger.prices.publish(author(), model, "default", ONE, at) for _ in range(6)]
    answers = await asyncio.gather(*rivals, return_exceptions=True)
    assert sum(isinstance(a, PriceOverlap) for a in answers) == 5, answers
    assert len(await versions(ledger, model)) == 1


async def test_a_publication_is_idempotent_by_its_key(ledger: Ledger, model: str) -> None:
    who = author()
    first = await ledger.prices.publish(who, model, "default", ONE, None)
    assert await ledger.prices.publish(who, model, "default", ONE, None) == first
    with pytest.raises(IdempotencyMismatch):
        await ledger.prices.publish(who, model, "default", TWO, None)
    assert len(await versions(ledger, model)) == 1


async def test_the_past_is_not_repriced(ledger: Ledger, model: str) -> None:
    with pytest.raises(InvalidRequest):
        await ledger.prices.publish(author(), model, "default", ONE, datetime.now(UTC) - timedelta(seconds=5))
    assert not await versions(ledger, model)


@pytest.mark.usefixtures("many_or_few")
async def test_the_most_particular_class_decides(ledger: Ledger, model: str, org_id: UUID) -> None:
    plan, other = f"plan-{uuid4().hex[:6]}", uuid4()
    for customer_class, output in (("default", 3), (plan, 2), (f"org:{org_id}", 1)):
        terms = PriceTerms(0, 0, 0, output * 1_000_000)
        await ledger.prices.publish(author(), model, customer_class, terms, None)
    for wallet, on_plan, amount in ((org_id, plan, 10), (other, plan, 20), (other, "default", 30), (other, "", 30)):
        assert (await ledger.held(wallet, 10, model=model, plan=on_plan)).amount == amount
        [listed] = [p for p in await ledger.prices.in_force(wallet, on_plan) if p.model == model]
        assert listed.terms.output == amount * 100_000


async def test_a_free_model_holds_nothing_and_is_recorded(ledger: Ledger, model: str, org_id: UUID) -> None:
    await ledger.prices.publish(author(), model, "default", PriceTerms(0, 0, 0, 0), None)
    held = await ledger.held(org_id, 10**6, model=model)
    assert held.amount == 0
    await ledger.writer.submit(settle(org_id, held.hold_id, 77))
    assert await ledger.pool.fetchval("SELECT output_tokens FROM billing.usage WHERE hold_id = $1", held.hold_id) == 77
    await ledger.verified()


async def test_cost_is_rounded_up_once_a_request(ledger: Ledger, model: str, org_id: UUID) -> None:
    await ledger.prices.publish(author(), model, "default", PriceTerms(0, 0, 0, 1_500_000), None)
    await ledger.writer.submit(grant(org_id, 1_000))
    for _ in range(3):
        placed = place(org_id, 1, model=model)
        await ledger.writer.submit(placed)
        await ledger.writer.submit(settle(org_id, placed.hold_id, 1))
    assert (await ledger.wallet(org_id)).spent == 6
    placed = place(org_id, 3, model=model)
    await ledger.writer.submit(placed)
    await ledger.writer.submit(settle(org_id, placed.hold_id, 3))
    assert (await ledger.wallet(org_id)).spent == 11
    await ledger.verified()


PRICE_FILE = """
[[price]]
model = "{model}"
input = "50"
cached_input = "25"
output = "{output}"
"""


async def publish_file(ledger: Ledger, file: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[int, str]:
    monkeypatch.setenv("TOLLGATE_BILLING_DATABASE_URL", ledger.url)
    file.write_text(text)
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["prices", "--file", str(file)])
    return result.exit_code, result.output


async def test_a_file_is_published_once_and_again_only_when_it_changed(
    ledger: Ledger, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prices.toml"
    for output, said in (("150", "published"), ("150.000", "unchanged"), ("151", "published"), ("151", "unchanged")):
        code, text = await publish_file(ledger, file, monkeypatch, PRICE_FILE.format(model=model, output=output))
        assert (code, text.strip()) == (0, f"{model} (default): {said}")
    found = await versions(ledger, model)
    assert [v["output"] for v in found] == [150 * 10**9, 151 * 10**9]
    assert found[0]["valid_until"] == found[1]["valid_from"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[price]", "is not TOML"),
        ("a = 1", "has no [[price]] table"),
        ('[[price]]\ninput = "1"', "has no model"),
        ('[[price]]\nmodel = "m"\ninput = 0.5\ncached_input = "0"\noutput = "1"', "input is a decimal string"),
        ('[[price]]\nmodel = "m"\ninput = "-1"\ncached_input = "0"\noutput = "1"', "m: input: An amount"),
        ('[[price]]\nmodel = "m"\ninput = "1"\ncached_input = "2"\noutput = "1"', "Cached input"),
        ('[[price]]\nmodel = "m"\nouput = "1"', "ouput"),
        (PRICE_FILE.format(model="m", output="1") * 2, "m (default) has two prices"),
    ],
)
async def test_a_file_with_a_mistake_publishes_nothing(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    code, output = await publish_file(ledger, tmp_path / "prices.toml", monkeypatch, text)
    assert (code, says in output) == (1, True), output
    assert not await versions(ledger, "m")
