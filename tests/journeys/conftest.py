"""What the journeys share: fresh users, the official SDK, the operator's console. All over the session's one stack.

A test that stops, kills or switches something puts it back before it ends, since the next one uses the same stack.
"""

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import httpx
import openai
import psutil
import pytest

from tests.deploy.unleash.console import Console
from tests.journeys.people import TIMEOUT_S, NewUser, Prices, User, client, nano, patiently, register
from tests.running_stack import RunningStack

PATIENCE_S = 60.0
POLL_S = 0.05
RUNNING_S, SUSPENDED_S = 0.001, 0.03  # of the slowed engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "journeys" in item.path.parts:
            item.add_marker("journey")


@pytest.fixture
def fresh_user(stack: RunningStack) -> Iterator[NewUser]:
    """A factory: every call registers somebody new, with limits and a wallet that nobody shares."""
    with ExitStack() as users:

        def make() -> User:
            user = register(stack.url)
            users.callback(user.clients.close)
            return user

        yield make


@pytest.fixture
def user(fresh_user: NewUser) -> User:
    return fresh_user()


@pytest.fixture
def unhurried_user(stack: RunningStack, user: User) -> User:
    """A fresh user whose key an operator has given far higher limits."""
    unlimit(stack, user)
    return user


@pytest.fixture
def openai_client(user: User) -> openai.OpenAI:
    """The official SDK with a fresh user's key."""
    return user.openai()


@pytest.fixture
async def async_openai_client(user: User) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{user.url}/v1", api_key=user.key, max_retries=0, timeout=TIMEOUT_S
    ) as client:
        yield client


@pytest.fixture(scope="session")
def prices(stack: RunningStack) -> Prices:
    """The list price of chat-mini, as billing publishes it to the demo user's key; asked once: that key has limits."""
    with client(stack.url, stack.api_key) as demo:
        answer = patiently(lambda: demo.get("/api/v1/billing/prices"))
    [price] = [p for p in answer.json()["data"] if p["model"] == "chat-mini"]
    return Prices(*(nano(price[name]) for name in ("per_request", "input", "cached_input", "output")))


@pytest.fixture
def console(stack: RunningStack) -> Iterator[Console]:
    """Unleash's console, as an operator uses it."""
    console = Console(stack.env["UNLEASH_URL"], stack.env["UNLEASH_ADMIN_TOKEN"])
    yield console
    console.close()


@pytest.fixture
def engine(stack: RunningStack) -> Callable[[str], float]:
    """Reads one of Triton's metrics, summed over the builds: `engine("slots_busy")`."""

    def read(name: str) -> float:
        text = httpx.get(stack.env["TRITON_METRICS_URL"], timeout=TIMEOUT_S).text
        lines = (line for line in text.splitlines() if line.startswith(f"tollgate_engine_{name}{{"))
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    return read


@pytest.fixture
def slow_engine(stack: RunningStack) -> Iterator[None]:
    """The engine as on a machine many times slower, so that an answer of chat-mini takes a second and can be left.

    Its processes are stopped and continued in turn: only ever for moments, so they never look dead.
    """
    stubs = engine_processes(stack)
    ended = threading.Event()

    def hold_back() -> None:
        while not ended.wait(RUNNING_S):
            for stub in stubs:
                stub.suspend()
            ended.wait(SUSPENDED_S)
            for stub in stubs:
                stub.resume()

    thread = threading.Thread(target=hold_back)
    thread.start()
    yield
    ended.set()
    thread.join()


def engine_processes(stack: RunningStack, build: str = "") -> list[psutil.Process]:
    """The processes in which Triton runs the builds, or one of them."""
    children = psutil.Process(stack.pid("triton")).children(recursive=True)
    living = (c for c in children if c.status() != psutil.STATUS_ZOMBIE)
    return [c for c in living if "stub" in (command := " ".join(c.cmdline())) and build in command]


def comes(condition: Callable[[], bool], *, within_s: float) -> bool:
    """Wait for a condition; whether it came."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def until(condition: Callable[[], bool], *, within_s: float = PATIENCE_S, what: str = "") -> float:
    """Wait for a condition; how long it took, in seconds. Fails when it does not come."""
    began = time.monotonic()
    if not comes(condition, within_s=within_s):
        pytest.fail(f"not within {within_s} s: {what or condition.__name__}")
    return time.monotonic() - began


def unlimit(stack: RunningStack, user: User) -> None:
    """What an operator does for a customer who needs more than the plan gives."""
    limits = {"minute": 10_000, "hour": 10_000, "day": 10_000, "concurrency": 100}
    answer = httpx.post(
        f"{stack.url}/api/v1/admin/auth/keys/{user.key_id}/limits",
        json={"limits": limits},
        headers={"Authorization": f"Bearer {stack.admin_token}"},
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == 200, answer.text
