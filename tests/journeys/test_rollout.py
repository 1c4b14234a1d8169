"""Rollout from Unleash: the slider moves the served build, the switch stops it, and Unleash itself may be away."""

from collections.abc import Iterator

import openai
import pytest

from tests.deploy.unleash.console import Console
from tests.journeys.conftest import until
from tests.journeys.people import QUESTION, User
from tests.running_stack import RunningStack

FLAG = "model.chat-mini"
SWITCH = "ops.chat-mini.allowed"
STABLE, CANARY = "chat-mini-q8_0", "chat-mini-q4_k_m"


def served(user: User) -> str:
    """The build that answers this user now."""
    answer = user.ask(max_tokens=1)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["system_fingerprint"])


@pytest.fixture
def slider(console: Console, unhurried_user: User) -> Iterator[Console]:
    """The console; the slider is back at 0 and the switch on, seen by chat, when the test ends."""
    yield console
    console.move_slider(FLAG, 0)
    console.switch(SWITCH, on=True)
    until(lambda: unhurried_user.ask(max_tokens=1).status_code == 200 and served(unhurried_user) == STABLE)


def test_the_slider_changes_the_served_build(slider: Console, unhurried_user: User) -> None:
    assert served(unhurried_user) == STABLE
    for percent, build in ((100, CANARY), (0, STABLE)):
        slider.move_slider(FLAG, percent)
        took_s = until(lambda build=build: served(unhurried_user) == build)  # type: ignore[misc]
        print(f"slider at {percent} %: {build} served after {took_s:.1f} s")


def test_a_user_keeps_the_build_while_the_slider_stands(slider: Console, unhurried_user: User) -> None:
    slider.move_slider(FLAG, 100)
    until(lambda: served(unhurried_user) == CANARY)
    assert {served(unhurried_user) for _ in range(20)} == {CANARY}


def test_the_kill_switch_answers_503_until_it_is_on_again(slider: Console, unhurried_user: User) -> None:
    sdk = unhurried_user.openai()
    slider.switch(SWITCH, on=False)
    until(lambda: unhurried_user.ask(max_tokens=1).status_code == 503)
    with pytest.raises(openai.InternalServerError) as e:
        sdk.chat.completions.create(model="chat-mini", messages=list(QUESTION))  # type: ignore[arg-type]
    assert (e.value.status_code, e.value.code) == (503, "model_disabled")
    assert int(e.value.response.headers["retry-after"]) >= 1
    assert sdk.models.list().data
    slider.switch(SWITCH, on=True)
    until(lambda: unhurried_user.ask(max_tokens=1).status_code == 200)


def test_unleash_away_stops_no_request_and_keeps_its_last_word(
    stack: RunningStack, slider: Console, unhurried_user: User
) -> None:
    slider.move_slider(FLAG, 100)
    until(lambda: served(unhurried_user) == CANARY)
    stack.stop("unleash")
    try:
        assert served(unhurried_user) == CANARY
        stack.wait_restarted("chat", stack.kill("chat"))
        until(lambda: unhurried_user.ask(max_tokens=1).status_code == 200, what="chat serves without Unleash")
        assert served(unhurried_user) == CANARY
    finally:
        stack.start("unleash")
