"""kill -9 of an engine's process, and of tritonserver, under fifty streams: every stream ends, every wallet adds up."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from deploy.local.ports import pick_port
from deploy.local.progress import Progress
from deploy.local.stack import STEPS, Stack
from deploy.local.state import Layout
from tests.conftest import ROOT
from tests.journeys.conftest import engine_processes, unlimit, until
from tests.journeys.people import LONG_QUESTION, NewUser, asking, register
from tests.journeys.test_recovery import STABLE, Customer, check_books
from tests.running_stack import RunningStack

STREAMS, CUSTOMERS = 50, 5
END_TIMEOUT_S = 150.0  # of a test that waits; by then every limit of chat has passed
ENDED_WITHIN_S = 5.0
SLOTS = STREAMS + CUSTOMERS
KILLED = Literal["stub", "triton"]


@dataclass
class Stream:
    """One client's stream and how it went; moments on the monotonic clock."""

    customer: Customer
    max_tokens: int
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended_s: float = 0.0
    end: str = ""
    """`done`, or the code of an error."""

    async def run(self, client: httpx.AsyncClient) -> None:
        """Read it to its end. Raises for an end that is none: then nobody could tell it from a complete answer."""
        user = self.customer.user
        headers = {"Authorization": f"Bearer {user.key}"}
        body = asking(
            stream=True, messages=LONG_QUESTION, max_tokens=self.max_tokens, stream_options={"include_usage": True}
        )
        async with client.stream("POST", f"{user.url}/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                self.end = json.loads(await answer.aread())["error"]["code"]
            async for line in answer.aiter_lines():
                self._take(line)
        self.ended_s = time.monotonic()
        self.has_begun.set()
        assert self.end, "the stream stopped without an end"

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.end = "done"
        if not line.startswith("data: {"):
            return
        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.end = event["error"]["code"]
        elif event["choices"] and event["choices"][0]["delta"].get("content"):
            self.has_begun.set()
        if (receipt := event.get("tollgate")) is not None and receipt["settled"] is not None:
            self.customer.receipts[receipt["hold_id"]] = Decimal(receipt["settled"])


def kill(stack: RunningStack, killed: KILLED) -> None:
    if killed == "triton":
        stack.kill("triton")
        return
    until(lambda: len(engine_processes(stack, STABLE)) == 1, what="the build has one process")
    engine_processes(stack, STABLE)[0].kill()


async def killed_under(
    stack: RunningStack, customers: Sequence[Customer], killed: KILLED, *, begun: int, max_tokens: int
) -> tuple[list[Stream], float]:
    """STREAMS streams, of which so many have begun when the process dies; all have ended. When it died."""
    streams = [Stream(customers[n % len(customers)], max_tokens) for n in range(STREAMS)]
    limits = httpx.Limits(max_connections=STREAMS)
    async with (
        httpx.AsyncClient(limits=limits, timeout=END_TIMEOUT_S) as client,
        asyncio.timeout(END_TIMEOUT_S),
        asyncio.TaskGroup() as tasks,
    ):
        for stream in streams:
            tasks.create_task(stream.run(client))
        while sum(s.has_begun.is_set() for s in streams) < begun:
            await asyncio.sleep(0.01)
        died_s = time.monotonic()
        await asyncio.to_thread(kill, stack, killed)
    return streams, died_s


@pytest.mark.timeout(400)
@pytest.mark.parametrize("killed", ["stub", "triton"])
async def test_every_stream_ends_and_every_wallet_adds_up(
    stack: RunningStack, fresh_user: NewUser, killed: KILLED
) -> None:
    """Those that wait for a slot may be answered by another build."""
    customers = [Customer(fresh_user()) for _ in range(CUSTOMERS)]
    for customer in customers:
        unlimit(stack, customer.user)
    streams, _ = await killed_under(stack, customers, killed, begun=3, max_tokens=300)
    assert any(stream.end != "done" for stream in streams), "nothing was under way"
    stack.wait_healthy()
    until(lambda: customers[0].user.ask().status_code == 200, what="chat is served again")
    check_books(stack, customers)


@pytest.fixture(scope="module")
def wide_stack(state_directory: Path) -> Iterator[RunningStack]:
    """A stack whose one build has a slot for every stream, and nobody behind it."""
    models = state_directory / "wide-models"
    shutil.copytree(ROOT / "triton_models" / STABLE, models / STABLE)
    configuration = models / STABLE / "config.pbtxt"
    text = configuration.read_text()
    assert '"slots" value: { string_value: "5" }' in text
    configuration.write_text(
        text.replace('"slots" value: { string_value: "5" }', f'"slots" value: {{ string_value: "{SLOTS}" }}')
    )
    (models / "catalogue.toml").write_text(
        f"""[models.chat-mini]
kind = "chat"
description = "With many slots."
created = 1763596800
stable = "{STABLE}"
[models.chat-mini.builds.{STABLE}]
engine = "llama.cpp"
quantization = "Q8_0"
context_tokens = 1024
slots = {SLOTS}
"""
    )
    layout = Layout(ROOT, state_directory / "wide", models)
    complete = Stack(layout, pick_port(frozenset()), {})
    try:
        yield RunningStack(complete, complete.up(Progress(None, STEPS)))
    finally:
        complete.down()


@pytest.mark.torture
@pytest.mark.timeout(1_800)
async def test_fifty_streams_in_full_flow_end_within_seconds(wide_stack: RunningStack) -> None:
    """Measured: run it on a quiet machine."""
    wide_stack.wait_healthy()
    for _ in range(3):
        for killed in ("stub", "triton"):
            with ExitStack() as clients:
                customers = [Customer(register(wide_stack.url)) for _ in range(CUSTOMERS)]
                for customer in customers:
                    clients.callback(customer.user.clients.close)
                    unlimit(wide_stack, customer.user)
                streams, died_s = await killed_under(wide_stack, customers, killed, begun=STREAMS, max_tokens=900)
                wide_stack.wait_healthy()
                check_books(wide_stack, customers)
            late_s = sorted(s.ended_s - died_s for s in streams if s.end != "done" and s.ended_s > died_s)
            codes = {stream.end for stream in streams}
            print(f"{killed}: {len(late_s)} ended by it {codes}, half after {late_s[len(late_s) // 2]:.2f} s, "
                  f"all after {late_s[-1]:.2f} s")  # fmt: skip
            assert late_s, "nothing was under way"
            assert late_s[-1] <= ENDED_WITHIN_S
