"""The engine begins while the hold is placed, for a wallet that was ample a moment ago; nothing is sent before it."""

import asyncio

import pytest

from shared.errors import PaymentRequired
from tests.chat.conftest import Chat, asking, told, until
from tests.chat.doubles import for_ever

AMPLE_NANO = 10**6


@pytest.fixture
async def ample(chat: Chat) -> Chat:
    """The service, which has just seen a large wallet."""
    chat.ledger.available_nano = AMPLE_NANO
    await chat.complete()
    chat.engine.reset()
    return chat


async def test_the_engine_need_not_wait_for_the_hold_but_the_client_does(ample: Chat) -> None:
    ample.ledger.placing = asyncio.Event()
    asked = asyncio.create_task(ample.complete(stream=True))

    async def generated() -> bool:
        return ample.engine.sent > 0

    await until(generated)
    assert not asked.done()
    ample.ledger.placing.set()
    answer = await asked
    assert "three" in answer.text
    assert len(ample.engine.generated) == 1
    assert ample.ledger.settled[-1].usage.output_tokens == 3


async def test_a_refused_hold_stops_the_engine(ample: Chat) -> None:
    ample.engine.chat = for_ever
    ample.ledger.refusal = PaymentRequired()
    answer = await ample.complete()
    assert answer.status_code == 402
    await told(ample.engine.stopped)


async def test_a_hold_that_covers_less_begins_anew_token_by_token(ample: Chat) -> None:
    ample.ledger.covered = 5
    assert (await ample.complete()).status_code == 200
    assert [p.get("tg_one_by_one") for p in ample.engine.parameters if "tg_tenant" in p] == [None, 1]


async def test_a_client_that_leaves_during_the_hold_stops_the_engine(ample: Chat) -> None:
    ample.engine.chat, ample.ledger.placing = for_ever, asyncio.Event()
    async with ample.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))
        await told(ample.engine.begun)
        asked.cancel()
        await told(ample.engine.stopped)
    ample.ledger.placing.set()


@pytest.mark.parametrize("available_nano", [0, 100, 5_000])
async def test_a_wallet_that_may_not_cover_it_is_asked_first(chat: Chat, available_nano: int) -> None:
    chat.ledger.available_nano = available_nano
    await chat.complete()
    chat.ledger.refusal = PaymentRequired()
    chat.engine.reset()
    assert (await chat.complete()).status_code == 402
    assert chat.engine.generated == []


async def test_a_key_beyond_its_tokens_stops_the_engine(ample: Chat) -> None:
    ample.engine.chat = for_ever
    async with ample.client(tokens_per_minute=20, limit_id="narrow") as client:
        refused = await client.post("/v1/chat/completions", json=asking())
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "tokens_above_limit")
    if ample.engine.generated:  # it may have been refused before the engine heard of it
        await told(ample.engine.stopped)
