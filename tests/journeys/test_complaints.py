"""What users of other gateways complain of, by the numbers of the project's list of complaints.

2: aborted streams are free. 3: or overbilled. 10: the proxy eats the model's speed. 11: a disconnected client keeps the
engine busy. `make bench-serving` has the figures to 10, `make bench-leaving` those to 11; test_many_leaving.py has
10,000 who leave at any moment.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest

from tests.journeys.conftest import comes, until
from tests.journeys.people import LONG_QUESTION, Prices, User, asking, client

pytestmark = pytest.mark.usefixtures("slow_engine")

WANTED_TOKENS = 600
CLIENTS = 10
ATTEMPTS_MAX = 10
TOLD_WITHIN_S = 5.0


def leave_after(user: User, chunks: int) -> int:
    """Read a stream's beginning and hang up; how many chunks with content came."""
    seen = 0
    body = asking(stream=True, messages=LONG_QUESTION, max_tokens=WANTED_TOKENS)
    with client(user.url, user.key) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            seen += '"content":"' in line and '"role"' not in line
            if seen == chunks:
                break
    return seen


def abort(user: User, chunks: int) -> dict[str, Any]:
    """What was settled for a stream that was left after so many chunks, before its answer was complete."""
    for number in range(1, ATTEMPTS_MAX + 1):
        seen = leave_after(user, chunks)
        until(lambda count=number: len(user.usage()) == count, what="the stream is settled")  # type: ignore[misc]
        paid = user.usage()[0]
        if paid["finish_reason"] == "cancelled":  # else the last token was on its way already
            assert seen == chunks
            return paid
    pytest.fail("every answer was complete before its client left")


def test_complaints_2_and_3_an_aborted_stream_costs_what_was_produced_no_less_and_no_more(
    unhurried_user: User, engine: Callable[[str], float], prices: Prices
) -> None:
    user, before = unhurried_user, engine("completion_tokens_total")
    paid = abort(user, chunks=5)
    assert 5 <= paid["output_tokens"] < WANTED_TOKENS
    until(lambda: engine("completion_tokens_total") - before >= paid["output_tokens"], what="the engine made them")
    cost = prices.of(paid["input_tokens"], paid["cached_input_tokens"], paid["output_tokens"])
    assert Decimal(paid["cost"]) == cost
    until(lambda: user.wallet().held == 0, what="nothing is held")
    assert sum(Decimal(u["cost"]) for u in user.usage()) == 100 - user.wallet().balance


def test_complaint_10_the_engine_never_waits_for_the_proxy(
    unhurried_user: User, engine: Callable[[str], float]
) -> None:
    """Of many clients most are in the engine or its queue: nothing on the way serves one after the other."""
    user, ended = unhurried_user, threading.Event()

    def ask() -> None:
        body = asking(stream=True, messages=LONG_QUESTION, max_tokens=WANTED_TOKENS)
        with client(user.url, user.key) as http:
            while not ended.is_set():
                with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    while not ended.is_set() and next(lines, None) is not None:
                        continue

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask) for _ in range(CLIENTS)]
        try:
            until(lambda: engine("slots_busy") + engine("queue_depth") > CLIENTS / 2, what="most are in the engine")
        finally:
            ended.set()
        for one in clients:
            one.result()


def test_complaint_11_a_client_that_is_gone_keeps_no_engine_busy(
    unhurried_user: User, engine: Callable[[str], float]
) -> None:
    before = engine("cancelled_total")
    for _ in range(ATTEMPTS_MAX):
        leave_after(unhurried_user, 1)
        if comes(lambda: engine("cancelled_total") > before, within_s=TOLD_WITHIN_S):
            break  # else the engine had written the last word before its client left
    else:
        pytest.fail("the engine was never told")
    until(lambda: engine("slots_busy") == engine("queue_depth") == 0, what="nothing is generated")
