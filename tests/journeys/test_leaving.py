"""A client that is killed in mid-stream stops the engine and pays for what was produced."""

import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from tests.journeys.conftest import comes, until
from tests.journeys.people import Prices, User

pytestmark = pytest.mark.usefixtures("slow_engine")

ATTEMPTS_MAX = 10  # a short answer may be complete before the kill lands
TOLD_WITHIN_S = 5.0

# Kills itself, without any farewell, when the first token arrives.
VICTIM = """
import os, signal, sys, httpx
body = {"model": "chat-mini", "stream": sys.argv[2] == "stream", "max_tokens": 900,
        "messages": [{"role": "user", "content": "What is Tollgate?"}]}
with httpx.stream("POST", sys.argv[1] + "/v1/chat/completions", json=body,
                  headers={"Authorization": "Bearer " + os.environ["KEY"]}) as answer:
    for line in answer.iter_lines():
        if '"content":"' in line and '"role"' not in line:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def cancelled(user: User) -> list[dict[str, Any]]:
    """The settlements of requests whose client left."""
    return [u for u in user.usage() if u["finish_reason"] == "cancelled"]


def test_killing_the_client_in_mid_stream_stops_the_engine_and_settles(
    unhurried_user: User, engine: Callable[[str], float], prices: Prices
) -> None:
    user, before = unhurried_user, engine("cancelled_total")

    def engine_was_told() -> bool:
        return engine("cancelled_total") > before

    for _ in range(ATTEMPTS_MAX):
        victim = subprocess.run(
            [sys.executable, "-c", VICTIM, user.url, "stream"], env={**os.environ, "KEY": user.key}, check=False
        )
        assert victim.returncode == -9, "the stream ended before its client was killed"
        until(lambda: user.wallet().held == 0, what="the hold is resolved")
        # The engine may have written the last word while the first was read: then nobody has to tell it.
        if cancelled(user) and comes(engine_was_told, within_s=TOLD_WITHIN_S):
            break
    else:
        pytest.fail("every answer was complete before its client was killed")
    until(lambda: engine("slots_busy") == 0, what="the slot is free")
    settled = cancelled(user)[0]
    assert 0 < settled["output_tokens"] < 900
    cost = prices.of(*(settled[name] for name in ("input_tokens", "cached_input_tokens", "output_tokens")))
    assert Decimal(settled["cost"]) == cost


def test_a_client_without_a_stream_that_hangs_up_stops_the_engine_too(
    unhurried_user: User, engine: Callable[[str], float]
) -> None:
    user, before = unhurried_user, engine("cancelled_total")

    def engine_was_told() -> bool:
        return engine("cancelled_total") > before

    for _ in range(ATTEMPTS_MAX):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, user.url, "whole"], env={**os.environ, "KEY": user.key}
        )
        until(lambda process=victim: user.wallet().held > 0 or process.poll() is not None)  # type: ignore[misc]
        victim.kill()
        victim.wait()
        until(lambda: user.wallet().held == 0, what="the hold is resolved")
        # Before the first token there is nothing to pay and no usage: then the engine alone tells.
        if cancelled(user) or comes(engine_was_told, within_s=TOLD_WITHIN_S):
            break
    else:
        pytest.fail("every answer was complete before its client was killed")
    until(engine_was_told, what="the engine was told")
    until(lambda: engine("slots_busy") == 0, what="the slot is free")
