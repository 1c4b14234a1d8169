"""kill -9 of any process: the supervisor brings it back, requests are served again, and the ledger adds up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal

import httpx
import pytest

from deploy.local.seed import run_module
from tests.journeys.conftest import engine_processes, unlimit, until
from tests.journeys.people import NewUser, User, asking, client
from tests.running_stack import RunningStack

SERVICES = ("gateway", "auth", "billing", "chat", "inference")
STABLE = "chat-mini-q8_0"
CUSTOMERS = 3
RESOLVED_WITHIN_S = 90.0  # a hold of a process that died expires, then the sweeper settles it


@dataclass
class Customer:
    """Streams one completion after the other; remembers every receipt."""

    user: User
    receipts: dict[str, Decimal] = field(default_factory=dict)
    failures: int = 0

    def run(self, stop: threading.Event) -> None:
        with client(self.user.url, self.user.key) as http:
            while not stop.is_set():
                try:
                    self._one(http)
                except (httpx.HTTPError, ValueError):
                    self.failures += 1
                    time.sleep(0.1)

    def _one(self, http: httpx.Client) -> None:
        with http.stream("POST", "/v1/chat/completions", json=asking(stream=True, max_tokens=200)) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(chunk["error"]["code"])
                if "tollgate" in chunk and chunk["tollgate"]["settled"] is not None:
                    self.receipts[chunk["tollgate"]["hold_id"]] = Decimal(chunk["tollgate"]["settled"])


@contextmanager
def busy(customers: list[Customer]) -> Iterator[None]:
    """The customers stream inside the block, and have stopped after it."""
    stop = threading.Event()
    threads = [threading.Thread(target=c.run, args=(stop,)) for c in customers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def check_books(stack: RunningStack, customers: list[Customer]) -> None:
    """No credit lost, none taken twice: every receipt is in the history once, and the history makes the balance."""
    for customer in customers:
        until(lambda c=customer: c.user.wallet().held == 0, within_s=RESOLVED_WITHIN_S, what="holds are resolved")  # type: ignore[misc]
        amounts: dict[str, Decimal] = {}
        for usage in customer.user.usage():
            assert usage["late"] or usage["hold_id"] not in amounts, "a hold was settled twice"
            amounts[usage["hold_id"]] = amounts.get(usage["hold_id"], Decimal(0)) + Decimal(usage["cost"])
        assert customer.receipts.items() <= amounts.items()
        assert customer.user.wallet().balance == 100 - sum(amounts.values())
    run_module(stack.stack.layout, ("services.billing", "verify"), stack.stack.services.administration("billing"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", [*SERVICES, "triton"])
def test_killing_a_process_loses_and_doubles_no_credit(stack: RunningStack, fresh_user: NewUser, program: str) -> None:
    customers = [Customer(fresh_user()) for _ in range(CUSTOMERS)]
    for customer in customers:
        unlimit(stack, customer.user)
    with busy(customers):
        until(lambda: all(len(c.receipts) >= 2 for c in customers), what="everybody is served")
        stack.wait_restarted(program, stack.kill(program))
        served = [len(c.receipts) for c in customers]
        until(
            lambda: all(len(c.receipts) >= before + 2 for c, before in zip(customers, served, strict=True)),
            what="everybody is served again",
        )
    stack.wait_healthy()
    check_books(stack, customers)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", ["postgres", "valkey"])
def test_a_data_store_that_is_killed_under_load_loses_and_doubles_no_credit(
    stack: RunningStack, fresh_user: NewUser, store: str
) -> None:
    test_killing_a_process_loses_and_doubles_no_credit(stack, fresh_user, store)


@pytest.mark.timeout(300)
def test_an_engine_process_that_dies_ends_its_streams_with_an_error_and_is_replaced(
    stack: RunningStack, fresh_user: NewUser
) -> None:
    """The server itself stays up, and its streams from the dead process stay open: silence is what tells."""
    customers = [Customer(fresh_user()) for _ in range(CUSTOMERS)]
    for customer in customers:
        unlimit(stack, customer.user)
    with busy(customers):
        until(lambda: all(len(c.receipts) >= 2 for c in customers), what="everybody is served")
        [process] = engine_processes(stack, STABLE)  # the stack was healthy: with every build
        process.kill()
        served = [len(c.receipts) for c in customers]
        until(
            lambda: all(len(c.receipts) >= before + 2 for c, before in zip(customers, served, strict=True)),
            what="everybody is served again",
        )
    stack.wait_healthy()
    check_books(stack, customers)


@pytest.mark.usefixtures("slow_engine")
def test_a_chat_service_that_is_told_to_stop_finishes_its_streams_first(stack: RunningStack, user: User) -> None:
    with ThreadPoolExecutor(1) as pool:
        with user.api.stream("POST", "/v1/chat/completions", json=asking(stream=True, max_tokens=30)) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            stopping = pool.submit(stack.stop, "chat")
            rest = [line for line in lines if line]
        stopping.result()
    try:
        assert rest[-1] == "data: [DONE]"
        refused = user.ask()
        assert refused.status_code in (502, 503)
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        assert int(refused.headers["retry-after"]) >= 1
    finally:
        stack.start("chat")
    until(lambda: user.wallet().held == 0, what="the hold is resolved")
