"""Clients that hang up at any moment leave nothing behind: slots, queue, holds, descriptors, memory, and a server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.local.triton import regions
from tests.journeys.conftest import engine_processes, unlimit, until
from tests.journeys.people import LONG_QUESTION, TIMEOUT_S, NewUser, User, asking
from tests.journeys.test_recovery import Customer, check_books
from tests.running_stack import RunningStack

PROGRAMS = ("gateway", "auth", "billing", "chat", "inference")
CUSTOMERS = 4
AT_ONCE = 16
CHAT_BUILDS = "chat-mini"  # the others come and go as they are used
WARM_UP = 40
SPARE_DESCRIPTORS = 40  # of each process: connections of pools come and go
LEAVE_WITHIN_S = 0.08
CHUNKS_MAX = 30


def descriptors(stack: RunningStack) -> dict[str, int]:
    """Open files of each program; Triton's with its engines'."""
    found = {program: _open_files(stack.pid(program)) for program in PROGRAMS}
    served = psutil.Process(stack.pid("triton")).children(recursive=True)
    return {**found, "triton": sum(_open_files(p.pid) for p in served)}


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def leave(user: User, chance: random.Random) -> None:
    """Ask, and hang up: after a while, or after so many chunks."""
    body = asking(stream=chance.random() < 0.7, max_tokens=chance.randrange(1, 60), messages=LONG_QUESTION)
    chunks = chance.randrange(CHUNKS_MAX) if chance.random() < 0.5 else None
    headers = {"Authorization": f"Bearer {user.key}"}
    async with httpx.AsyncClient(base_url=user.url, headers=headers, timeout=TIMEOUT_S) as client:
        try:
            async with asyncio.timeout(None if chunks is not None else chance.random() * LEAVE_WITHIN_S):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    if answer.status_code != 200:  # a machine that is very busy may refuse some, for now
                        assert answer.status_code in (502, 503, 504), await answer.aread()
                    lines = answer.aiter_lines()
                    for _ in range(chunks if chunks is not None else CHUNKS_MAX * 10):
                        await anext(lines, None)
        except TimeoutError:
            pass


async def crowd(users: Sequence[User], leavers: int, chance: random.Random) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await leave(users[number % len(users)], chance)

    async with asyncio.TaskGroup() as tasks:
        for number in range(leavers):
            tasks.create_task(one(number))


@pytest.mark.parametrize(
    "leavers", [100, pytest.param(10_000, marks=[pytest.mark.torture, pytest.mark.timeout(7_200)])]
)
async def test_who_leaves_at_any_moment_leaves_nothing_behind(
    stack: RunningStack, fresh_user: NewUser, engine: Callable[[str], float], leavers: int
) -> None:
    chance = random.Random(leavers)
    customers = [Customer(fresh_user()) for _ in range(CUSTOMERS)]
    users = [customer.user for customer in customers]
    for user in users:
        unlimit(stack, user)

    def is_quiet() -> bool:
        return engine("slots_busy") == engine("queue_depth") == 0 and all(u.wallet().held == 0 for u in users)

    await crowd(users, WARM_UP, chance)
    until(is_quiet, what="the first have left nothing")
    server, engines = stack.pid("triton"), {p.pid for p in engine_processes(stack, CHAT_BUILDS)}
    files, memory = descriptors(stack), set(regions(stack.stack.layout.stack_id))

    await crowd(users, leavers, chance)
    until(is_quiet, what="slots, queue and holds are free")
    check_books(stack, customers)
    assert stack.pid("triton") == server, f"tritonserver died: {stack.log('triton')}"
    assert {p.pid for p in engine_processes(stack, CHAT_BUILDS)} == engines
    assert set(regions(stack.stack.layout.stack_id)) <= memory

    def is_closed() -> bool:
        return all(now <= files[program] + SPARE_DESCRIPTORS for program, now in descriptors(stack).items())

    until(is_closed, what="descriptors are closed")
