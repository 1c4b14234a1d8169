"""A client that leaves stops the engine at once and pays for what was produced, and no more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from tests.chat.conftest import LONG, Chat, asking, told, until
from tests.chat.doubles import Item, chunk, for_ever


async def endless(_: dict[str, Any]) -> AsyncIterator[Item]:
    """A token every 10 ms."""
    yield chunk("", 0)
    tokens = 0
    while True:
        tokens += 1
        yield chunk("word ", tokens)
        await asyncio.sleep(0.01)


async def flood(_: dict[str, Any]) -> AsyncIterator[Item]:
    """More than anybody's buffers hold."""
    tokens = 0
    while True:
        tokens += 1
        yield chunk("x" * 60_000, tokens)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_stops_the_engine_and_voids_the_hold(chat: Chat, stream: bool) -> None:
    chat.engine.chat = for_ever
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking(stream=stream)))

        async def generating() -> bool:
            return bool(chat.engine.generated)

        await until(generating)
        asked.cancel()
        await told(chat.engine.stopped)
    await told(chat.ledger.resolved)
    assert [v.reason for v in chat.ledger.voided] == ["cancelled"]
    assert chat.ledger.settled == []


async def test_leaving_while_the_prompt_is_counted_holds_nothing(chat: Chat) -> None:
    chat.engine.count = for_ever
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking(messages=LONG, max_tokens=50)))
        await told(chat.engine.begun)
        asked.cancel()
        await told(chat.engine.stopped)
    assert chat.ledger.holds == []


async def test_leaving_in_mid_stream_stops_the_engine_and_settles_what_was_produced(chat: Chat) -> None:
    chat.engine.chat = endless
    seen = 0
    async with chat.client() as client, client.stream("POST", "/v1/chat/completions", json=asking(stream=True)) as r:
        async for line in r.aiter_lines():
            seen += '"content":"word ' in line
            if seen == 5:
                break
    await told(chat.engine.stopped)
    await told(chat.ledger.resolved)
    [settled] = chat.ledger.settled
    assert settled.finish_reason == "cancelled"
    assert settled.usage.input_tokens == 7
    assert 5 <= settled.usage.output_tokens <= chat.engine.sent
    assert chat.ledger.voided == []


async def test_leaving_without_a_stream_stops_the_engine_and_settles_what_was_produced(chat: Chat) -> None:
    chat.engine.chat = endless
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))

        async def producing() -> bool:
            return chat.engine.sent > 10

        await until(producing)
        asked.cancel()
        await told(chat.engine.stopped)
    await told(chat.ledger.resolved)
    [settled] = chat.ledger.settled
    assert settled.finish_reason == "cancelled"
    assert 0 < settled.usage.output_tokens <= chat.engine.sent


async def test_a_client_that_stops_reading_is_cut_off(hasty: Chat) -> None:
    chat = hasty
    chat.engine.chat = flood
    async with chat.client() as client, client.stream("POST", "/v1/chat/completions", json=asking(stream=True)):
        await told(chat.engine.stopped)
        await told(chat.ledger.resolved)
    assert chat.ledger.settled[0].finish_reason == "cancelled"


async def leave(chat: Chat, leavers: int) -> None:
    """So many clients leave, at moments spread over the life of a request; and then there is nothing left of them."""
    chat.engine.chat = endless
    async with chat.client() as client:
        for turn in range(leavers):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001 * (turn % 40 + 1)):
                    await client.post("/v1/chat/completions", json=asking(stream=turn % 2 == 0))

        async def all_is_quiet() -> bool:
            return await chat.ledger.is_quiet() and await chat.is_idle()

        await until(all_is_quiet)
    assert chat.ledger.settled
    assert chat.ledger.voided


async def test_a_hundred_leavers_at_any_moment_leave_nothing_behind(chat: Chat) -> None:
    await leave(chat, 100)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
async def test_ten_thousand_leavers_leave_nothing_behind(chat: Chat) -> None:
    process = psutil.Process()
    await leave(chat, 100)
    before = process.num_fds(), len(asyncio.all_tasks())
    await leave(chat, 10_000)
    assert process.num_fds() <= before[0] + 10
    assert len(asyncio.all_tasks()) <= before[1] + 10
