"""A build that fails before its first token is replaced by the next; one that keeps failing is left alone."""

from collections.abc import AsyncIterator

import pytest

from services.chat.domain.breaker import Breakers
from tests.chat.conftest import PATIENT, Chat, Surroundings, run_chat, until
from tests.chat.doubles import EngineError, chunk
from tests.chat.test_failures import failing


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [EngineError("engine_error"), EngineError("queue_full"), ValueError("not loaded")])
async def test_the_next_build_answers_for_one_that_fails_at_first(chat: Chat, failure: Exception, stream: bool) -> None:
    chat.engine.by_build = {"small-a": failing(failure)}
    answer = await chat.complete(stream=stream)
    assert answer.status_code == 200
    assert '"system_fingerprint":"small-b"' in answer.text
    assert chat.engine.builds == ["small-a", "small-b"]
    [settled] = chat.ledger.settled
    assert (settled.build, settled.usage.output_tokens) == ("small-b", 3)
    assert len(chat.ledger.holds) == 1


async def test_after_the_first_token_nobody_else_answers(chat: Chat) -> None:
    chat.engine.by_build = {"small-a": failing(chunk("one", 1), EngineError("engine_error"))}
    assert (await chat.complete()).status_code == 502
    assert chat.engine.builds == ["small-a"]


async def test_a_bad_request_is_bad_for_every_build(chat: Chat) -> None:
    chat.engine.by_build = {"small-a": failing(EngineError("invalid_request"))}
    assert (await chat.complete()).status_code == 400
    assert chat.engine.builds == ["small-a"]


async def test_a_build_whose_context_is_too_small_is_passed_over(chat: Chat) -> None:
    chat.engine.by_build = {"small-a": failing(EngineError("engine_error"))}
    answer = await chat.complete(max_tokens=84)  # with the prompt 91 tokens or more: small-b has 90
    assert answer.status_code == 502
    assert "small-b" not in chat.engine.builds


class Clock:
    now_s = 0.0


def breakers(clock: Clock) -> Breakers:
    return Breakers(failures_max=2, pause_s=10, now_s=lambda: clock.now_s)


def test_a_breaker_opens_after_failures_in_a_row_and_tries_one_request_per_pause() -> None:
    clock = Clock()
    tested = breakers(clock)
    tested.failed("a")
    assert tested.admits("a")
    tested.failed("a")
    assert not tested.admits("a")
    assert tested.admits("b")
    clock.now_s = 10.0
    assert tested.admits("a")
    tested.trying("a")
    assert not tested.admits("a")
    clock.now_s = 20.0
    tested.trying("a")
    tested.succeeded("a")
    assert tested.admits("a")


def test_a_success_in_between_begins_the_count_anew() -> None:
    tested = breakers(Clock())
    for _ in range(5):
        tested.failed("a")
        tested.succeeded("a")
    assert tested.admits("a")


def test_a_build_that_was_loaded_anew_begins_without_failures() -> None:
    tested = breakers(Clock())
    for name in ("a", "b"):
        tested.failed(name)
        tested.failed(name)
    tested.forget("a")
    assert (tested.admits("a"), tested.admits("b")) == (True, False)


@pytest.fixture
async def sensitive(surroundings: Surroundings) -> AsyncIterator[Chat]:
    """One failure, and a build is left alone for longer than any test."""
    async with run_chat(surroundings, {**PATIENT, "chat_breaker_failures_max": 1, "chat_breaker_pause_ms": 10**9}) as c:
        yield c
        surroundings.catalogue.lost.clear()
        surroundings.catalogue.lost_at_ms.clear()


@pytest.mark.parametrize("is_seen", [True, False])
async def test_a_replaced_build_answers_at_once(sensitive: Chat, is_seen: bool) -> None:
    """Also one that was replaced so soon that nobody saw it away."""
    chat, builds = sensitive, {"small-a", "small-b"}

    async def states() -> set[str]:
        async with chat.client() as client:
            listed = (await client.get("/v1/models/small")).json()["builds"]
        return {b["state"] for b in listed}

    async def are_gone() -> bool:
        return "ready" not in await states()

    async def are_back() -> bool:
        return await states() == {"ready"}

    async def is_served() -> bool:
        return (await chat.complete()).status_code == 200

    chat.engine.by_build = dict.fromkeys(builds, failing(EngineError("engine_error")))
    assert (await chat.complete()).status_code == 502
    chat.engine.reset()
    refused = await chat.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    if is_seen:
        chat.catalogue.lost |= builds
        await until(are_gone)
        chat.catalogue.lost.clear()
        await until(are_back)
        assert (await chat.complete()).status_code == 200
    else:
        chat.catalogue.lost_at_ms = dict.fromkeys(builds, 1)
        await until(is_served)
