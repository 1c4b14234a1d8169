"""An engine that fails: before its first word nothing is owed, after it exactly what was produced."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.chat.triton import SUSPICIOUS_SILENCE_S
from shared.rpc import inference_pb2
from tests.chat.conftest import LONG, PATIENT, Chat, Surroundings, asking, run_chat, told, until
from tests.chat.doubles import EngineError, Item, Script, chunk, for_ever

ATTEMPTS_MAX = 5


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
    hasty: Chat, case: str, stream: bool
) -> None:
    chat = hasty
    chat.engine.chat, status, code = BEFORE[case]
    answer = await chat.complete(stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 503 or int(answer.headers["retry-after"]) >= 1
    await told(chat.ledger.resolved)
    assert (len(chat.ledger.voided), chat.ledger.settled) == (1, [])


@pytest.mark.parametrize("case", ["a failure", "a model that is not loaded", "nothing at all", "silence"])
async def test_a_failure_while_counting_takes_no_hold(hasty: Chat, case: str) -> None:
    chat = hasty
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
    hasty: Chat, case: str
) -> None:
    chat = hasty
    chat.engine.chat, code = MIDWAY[case]
    answer = await chat.complete(stream=True)
    assert answer.status_code == 200
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    error = json.loads(blocks[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    said = [json.loads(b.removeprefix("data: "))["choices"][0]["delta"].get("content") for b in blocks[:-1]]
    assert "".join(filter(None, said)) == "one two"
    await told(chat.ledger.resolved)
    [settled] = chat.ledger.settled
    assert (settled.usage.input_tokens, settled.usage.output_tokens) == (7, 2)
    assert (settled.finish_reason, settled.build, chat.ledger.voided) == ("error", "small-a", [])


@pytest.mark.parametrize("case", sorted(MIDWAY))
async def test_a_failure_midway_without_a_stream_is_an_error_and_settles_what_was_produced(
    hasty: Chat, case: str
) -> None:
    chat = hasty
    chat.engine.chat, code = MIDWAY[case]
    answer = await chat.complete()
    assert answer.status_code >= 500
    assert answer.json()["error"]["code"] == code
    await told(chat.ledger.resolved)
    assert chat.ledger.settled[0].usage.output_tokens == 2


async def test_silence_stops_the_engine(hasty: Chat) -> None:
    hasty.engine.chat = then_silent(*WORDS)
    await hasty.complete()
    await told(hasty.engine.stopped)


async def test_a_stream_of_a_dead_process_is_broken_off(hasty: Chat) -> None:
    hasty.engine.chat, hasty.engine.is_dead = then_silent(*WORDS), True
    assert (await hasty.complete()).status_code == 504
    await told(hasty.engine.broken)
    assert not hasty.engine.stopped.is_set()


async def test_an_answer_ends_with_its_finish_reason_not_with_the_engines_stream(hasty: Chat) -> None:
    """A stream that never ends is broken off, without a word to an engine that has done its work."""
    hasty.engine.chat = then_silent(*WORDS, chunk("", 2, "stop"))
    answer = await hasty.complete()
    assert answer.status_code == 200, answer.text
    assert [s.finish_reason for s in hasty.ledger.settled] == ["stop"]
    await told(hasty.engine.broken)
    assert not hasty.engine.stopped.is_set()


@pytest.mark.parametrize("is_back", [False, True])
async def test_a_silent_build_that_the_catalogue_lost_is_given_up_early(chat: Chat, is_back: bool) -> None:
    """Long before `chat`'s own time for a first chunk, which no test waits for; also one that was replaced so soon that
    nobody saw it away.
    """
    chat.engine.by_build = {"small-a": for_ever, "small-b": failing(EngineError("queue_full"))}
    async with chat.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))

        async def generating() -> bool:
            return bool(chat.engine.generated)

        await until(generating)
        if is_back:
            chat.catalogue.lost_at_ms["small-a"] = chat.catalogue.lost_at_ms.get("small-a", 0) + 1
        else:
            chat.catalogue.lost.add("small-a")
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    await told(chat.engine.stopped)
    assert [v.reason for v in chat.ledger.voided] == ["error"]


async def test_a_silence_brings_the_next_look_at_the_catalogue_forward(chat: Chat, surroundings: Surroundings) -> None:
    """Of a service that looks once an hour while all is well."""
    engine, catalogue = surroundings.engine, surroundings.catalogue
    catalogue.asleep_is = inference_pb2.BUILD_STATE_UNLOADED
    async with run_chat(surroundings, {**PATIENT, "catalogue_refresh_ms": 3_600_000}) as calm, calm.client() as client:
        catalogue.asleep_is = inference_pb2.BUILD_STATE_LOADING
        engine.reset()
        engine.by_build = {"small-a": for_ever, "small-b": failing(EngineError("queue_full"))}
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=asking()))

        async def generating() -> bool:
            return bool(engine.generated)

        await until(generating)
        catalogue.lost.add("small-a")
        assert (await asked).json()["error"]["code"] == "overloaded"
        await told(engine.stopped)


async def test_a_build_that_speaks_is_not_given_up_because_the_catalogue_lost_it(chat: Chat) -> None:
    """Chunks go on until the catalogue has long lost it. A machine that held them back so long that the build looked
    silent proves nothing: then once more.
    """
    gaps_s: list[float] = []

    async def slow(_: dict[str, Any]) -> AsyncIterator[Item]:
        began_s = last_s = time.monotonic()
        while last_s - began_s < 1.5 * SUSPICIOUS_SILENCE_S:
            await asyncio.sleep(0.05)
            yield chunk("x", 1)
            gaps_s.append(time.monotonic() - last_s)
            last_s = time.monotonic()
        yield chunk("", 1, "stop")

    async def is_served() -> bool:
        async with chat.client() as client:
            builds = (await client.get("/v1/models/small")).json()["builds"]
        return bool(builds[0]["state"] == "ready")

    chat.engine.chat = slow
    for _ in range(ATTEMPTS_MAX):
        chat.catalogue.lost.clear()
        await until(is_served)
        gaps_s.clear()
        chat.engine.begun.clear()
        asked = asyncio.create_task(chat.complete())
        await told(chat.engine.begun)
        chat.catalogue.lost.add("small-a")
        answer = await asked
        if answer.status_code == 200 or max(gaps_s) < SUSPICIOUS_SILENCE_S / 2:
            break
    assert set(answer.json()["choices"][0]["message"]["content"]) == {"x"}


async def test_an_engines_own_words_stay_inside(chat: Chat) -> None:
    chat.engine.chat = failing(EngineError("engine_error", "segfault at 0xdeadbeef in /srv/model"))
    assert "0xdeadbeef" not in (await chat.complete()).text


async def test_generations_beyond_the_limit_are_refused_and_leave_no_trace(chat: Chat) -> None:
    go_on = asyncio.Event()

    async def waiting(_: dict[str, Any]) -> AsyncIterator[Item]:
        yield chunk("one", 1)
        await go_on.wait()
        yield chunk("", 1, "stop")

    chat.engine.chat = waiting
    async with chat.client() as client:
        running = [asyncio.create_task(client.post("/v1/chat/completions", json=asking())) for _ in range(3)]

        async def all_run() -> bool:
            return len(chat.ledger.holds) == 3

        await until(all_run)
        refused = await client.post("/v1/chat/completions", json=asking())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        go_on.set()
        assert {r.status_code for r in await asyncio.gather(*running)} == {200}
    assert len(chat.ledger.holds) == 3
    await until(chat.is_idle)


async def test_the_outcome_is_counted_by_model_and_build(chat: Chat) -> None:
    line = 'tollgate_chat_requests_total{build="%s",model="small",outcome="%s"}'
    before = await chat.metric(line % ("small-a", "stop")), await chat.metric(line % ("small-b", "engine_error"))
    await chat.complete()
    chat.engine.chat = failing(EngineError("engine_error"))
    await chat.complete()
    assert await chat.metric(line % ("small-a", "stop")) == before[0] + 1
    assert await chat.metric(line % ("small-b", "engine_error")) == before[1] + 1
