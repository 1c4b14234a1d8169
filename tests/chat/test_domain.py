"""The pure rules: which build, how many tokens, exact money."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chat.domain.catalogue import Build, BuildState, Model, fallback_chain, output_budget
from services.chat.errors import from_engine
from shared.errors import InvalidRequest
from shared.money import format_credits


def build(name: str, state: BuildState, context_tokens: int = 100) -> Build:
    return Build(name, name, "", "127.0.0.1:1", "llama.cpp", "Q8_0", context_tokens, state)


def model(a: BuildState, b: BuildState) -> Model:
    return Model("m", "chat", "", 0, "a", {"a": build("a", a), "b": build("b", b, 50)})


READY, LOADING, GONE = BuildState.READY, BuildState.LOADING, BuildState.UNAVAILABLE


@pytest.mark.parametrize(
    ("states", "wanted", "served"),
    [
        ((READY, READY), "b", "b"),
        ((READY, READY), "a", "a"),
        ((READY, READY), None, "a"),
        ((READY, READY), "unheard-of", "a"),
        ((READY, LOADING), "b", "a"),
        ((READY, GONE), "b", "a"),
        ((LOADING, READY), "b", "b"),
        ((LOADING, READY), None, "b"),
        ((GONE, GONE), "b", None),
    ],
)
def test_a_wanted_build_serves_when_ready_else_the_stable_one_else_any_other(
    states: tuple[BuildState, BuildState], wanted: str | None, served: str | None
) -> None:
    chain = fallback_chain(model(*states), wanted)
    assert (chain[0].name if chain else None) == served
    assert len(chain) == states.count(READY)


def test_a_model_promises_the_least_context_of_its_builds() -> None:
    assert model(READY, READY).context_tokens == 50


@pytest.mark.parametrize(
    ("asked", "prompt", "budget"),
    [(None, 10, 40), (None, 70, 30), (None, 99, 1), (5, 10, 5), (90, 10, 90), (60, 10, 60)],
)
def test_the_budget_is_what_was_asked_or_the_default_within_the_context(
    asked: int | None, prompt: int, budget: int
) -> None:
    assert output_budget(asked, default=40, prompt_tokens=prompt, context_tokens=100) == budget


@pytest.mark.parametrize(("asked", "prompt"), [(None, 100), (None, 200), (91, 10), (1, 100)])
def test_a_request_that_cannot_fit_is_refused_before_it_costs_anything(asked: int | None, prompt: int) -> None:
    with pytest.raises(InvalidRequest) as refused:
        output_budget(asked, default=40, prompt_tokens=prompt, context_tokens=100)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_credits_are_written_exactly(nano: int) -> None:
    text = format_credits(nano)
    assert Decimal(text) * 10**9 == nano
    assert len(text.partition(".")[2]) >= 2
    assert not text.endswith("000")


@pytest.mark.parametrize(
    ("code", "status", "ours"),
    [
        ("invalid_request", 400, "invalid_request"),
        ("context_length_exceeded", 400, "context_length_exceeded"),
        ("queue_full", 503, "overloaded"),
        ("deadline_exceeded", 504, "deadline_exceeded"),
        ("cancelled", 503, "engine_unavailable"),
        ("engine_error", 502, "engine_error"),
        ("something_new", 502, "engine_error"),
    ],
)
def test_engine_errors_have_a_status_of_their_own(code: str, status: int, ours: str) -> None:
    error = from_engine(code, "A sentence.")
    assert (error.status, error.code) == (status, ours)
    assert status != 503 or error.retry_after_s
