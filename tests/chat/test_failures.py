"""An engine that fails: before its first word nothing is owed, after it exactly what was produced."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.chat.conftest import LONG, Chat, asking, until
from tests.chat.doubles import EngineError, Item, Script, chunk, for_ever


def failing(*items: Item) -> Script:
    async def script(_: dict[str, Any]) -> AsyncIterator[Item]:
        for item in items:
            yield item

    return script


def then_silent(*items: Item) -> Script:
    async def script(_: dict[str, Any]) -> AsyncIterator[Item]:
        for item in items:
            yield item
        await asyncio.Event().wait()

    return script


FIRST_CHUNK_TIMEOUT_S = 4.0  # as conftest.py sets it

BEFORE = {
    "a prompt that is too long": (failing(EngineError("context_length_exceeded")), 400, "context_length_exceeded"),
    "a bad request": (failing(EngineError("invalid_request")), 400, "invalid_request"),
    "a full queue": (failing(EngineError("queue_full")), 503, "overloaded"),
    "its deadline": (failing(EngineError("deadline_exceeded")), 504, "deadline_exceeded"),
    "a failure": (failing(EngineError("engine_error")), 502, "engine_error"),
    "a model that is not loaded": (failing(ValueError("unknown model 'small-a'")), 503, "engine_unavailable"),
    "nothing at all": (failing(), 502, "engine_error"),
    "rubbish": (failing(b"not json"), 502, "engine_error"),
    "another contract": (failing({"choices": []}), 502, "engine_error"),
    "silence": (for_ever, 504, "engine_timeout"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", sorted(BEFORE))
async def test_a_failure_before_the_first_token_has_its_status_and_voids_the_hold(
    chat: Chat, case: str, stream: bool
) -> None:
    chat.engine.chat, status, code = BEFORE[case]
    answer = await chat.complete(stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 503 or int(answer.headers["retry-after"]) >= 1
    await chat.ledger.resolved.wait()
    assert (len(chat.ledger.voided), chat.ledger.settled) == (1, [])


@pytest.mark.parametrize("case", ["a failure", "a model that is not loaded", "nothing at all", "silence"])
async def test_a_failure_while_counting_takes_no_hold(chat: Chat, case: str) -> None:
    chat.engine.count, status, code = BEFORE[case]
    answer = await chat.complete(messages=LONG, max_tokens=50)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert chat.ledger.holds == []


WORDS = (chunk("", 0), chunk("one", 1), chunk(" two", 2))
MIDWAY = {
    "a failure": (failing(*WORDS, EngineError("engine_error")), "engine_error"),
    "a stub that died": (failing(*WORDS, ValueError("Stub process is not healthy.")), "engine_unavailable"),
    "rubbish": (failing(*WORDS, b"not json"), "engine_error"),
    "an early end": (failing(*WORDS), "engine_error"),
    "silence": (then_silent(*WORDS), "engine_timeout"),
}


@pytest.mark.parametrize("case", sorted(MIDWAY))
async def test_a_failure_in_mid_stream_is_told_in_the_stream_and_settles_what_was_produced(
    chat: Chat, case: str
) -> None:
    chat.engine.chat, code = MIDWAY[case]
    answer = await chat.complete(stream=True)
    assert answer.status_code == 200
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    error = json.loads(blocks[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    said = [json.loads(b.removeprefix("data: "))["choices"][0]["delta"].get("content") for b in blocks[:-1]]
    assert "".join(filter(None, said)) == "one two"
    await chat.ledger.resolved.wait()
    [settled] = chat.ledger.settled
    assert (settled.usage.input_tokens, settled.usage.output_tokens) == (7, 2)
    assert (settled.finish_reason, settled.build, chat.ledger.voided) == ("error", "small-a", [])


@pytest.mark.parametrize("case", sorted(MIDWAY))
async def test_a_failure_midway_without_a_stream_is_an_error_and_settles_what_was_produced(
    chat: Chat, case: str
) -> None:
    chat.engine.chat, code = MIDWAY[case]
    answer = await chat.complete()
    assert answer.status_code >= 500
    assert answer.json()["error"]["code"] == code
    await chat.ledger.resolved.wait()
    assert chat.ledger.settled[0].usage.output_tokens == 2


async def test_silence_stops_the_engine(chat: Chat) -> None:
    chat.engine.chat = then_silent(*WORDS)
    await chat.complete()
    await asyncio.wait_for(chat.engine.stopped.wait(), 2)


async def test_a_silent_build_that_the_catalogue_lost_is_given_up_early(chat: Chat) -> None:
    chat.engine.by_build = {"small-a": for_ever, "small-b": failing(EngineError("queue_full"))}
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))

        async def generating() -> bool:
            return bool(chat.engine.generated)

        await until(generating)
        began = time.monotonic()
        chat.catalogue.lost.add("small-a")
        answer = await asked
        assert time.monotonic() - began < FIRST_CHUNK_TIMEOUT_S - 0.5
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    await asyncio.wait_for(chat.engine.stopped.wait(), 2)
    assert [v.reason for v in chat.ledger.voided] == ["error"]


async def test_a_build_that_speaks_is_not_given_up_because_the_catalogue_lost_it(chat: Chat) -> None:
    async def slow(_: dict[str, Any]) -> AsyncIterator[Item]:
        for i in range(1, 21):
            await asyncio.sleep(0.1)
            yield chunk("x", i)
        yield chunk("", 20, "stop")

    chat.engine.chat = slow
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))
        await asyncio.wait_for(chat.engine.begun.wait(), 2)
        chat.catalogue.lost.add("small-a")
        answer = (await asked).json()
    assert answer["choices"][0]["message"]["content"] == "x" * 20


async def test_an_engines_own_words_stay_inside(chat: Chat) -> None:
    chat.engine.chat = failing(EngineError("engine_error", "segfault at 0xdeadbeef in /srv/model"))
    assert "0xdeadbeef" not in (await chat.complete()).text


async def test_generations_beyond_the_limit_are_refused_and_leave_no_trace(chat: Chat) -> None:
    chat.engine.chat = then_silent(chunk("one", 1))
    before = await chat.metric("tollgate_chat_streams")
    async with chat.client() as client:
        running = [asyncio.create_task(client.post("/v1/chat/completions", json=asking())) for _ in range(3)]

        async def all_run() -> bool:
            return len(chat.ledger.holds) == 3

        await until(all_run)
        refused = await client.post("/v1/chat/completions", json=asking())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert {r.status_code for r in await asyncio.gather(*running)} == {504}
    assert len(chat.ledger.holds) == 3
    assert await chat.metric("tollgate_chat_streams") == before == 0


async def test_the_outcome_is_counted_by_model_and_build(chat: Chat) -> None:
    line = 'tollgate_chat_requests_total{build="%s",model="small",outcome="%s"}'
    before = await chat.metric(line % ("small-a", "stop")), await chat.metric(line % ("small-b", "engine_error"))
    await chat.complete()
    chat.engine.chat = failing(EngineError("engine_error"))
    await chat.complete()
    assert await chat.metric(line % ("small-a", "stop")) == before[0] + 1
    assert await chat.metric(line % ("small-b", "engine_error")) == before[1] + 1
