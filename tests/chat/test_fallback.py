"""A build that fails before its first token is replaced by the next; one that keeps failing is left alone."""

import pytest

from services.chat.domain.breaker import Breakers
from tests.chat.conftest import Chat
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
