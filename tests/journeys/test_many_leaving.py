"""Clients that hang up at any moment leave nothing behind: slots, queue, holds, descriptors, memory, and a server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from deploy.local.triton import regions
from tests.journeys.conftest import engine_processes, unlimit, until
from tests.journeys.people import LONG_QUESTION, NewUser, User, asking
from tests.journeys.test_recovery import Customer, check_books
from tests.running_stack import RunningStack

PROGRAMS = ("gateway", "auth", "billing", "chat", "inference")
AT_ONCE = 16
BATCH = 100
CHAT_BUILDS = "chat-mini"  # the others come and go as they are used
WARM_UP = 40
SPARE_DESCRIPTORS = 40  # of each process: connections of pools come and go
LINES_MAX = 60  # read before a client leaves; an event is two or three
TOKENS_MAX = 400
LEAVE_AT_LAST_S = 120.0
PATIENCE_S = 0.5  # of those who do not count lines: at first
EARLIER, LATER = 0.8, 1.25  # so that about half of them leave while the engine works, however fast it is now


def descriptors(stack: RunningStack) -> dict[str, int]:
    """Open files of each program; Triton's with its engines'."""
    found = {program: _open_files(stack.pid(program)) for program in PROGRAMS}
    served = psutil.Process(stack.pid("triton")).children(recursive=True)
    return {**found, "triton": sum(_open_files(p.pid) for p in served)}


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def leave(user: User, chance: random.Random, patience_s: float) -> None:
    """Ask, and hang up: after so many lines of the answer, or within `patience_s`."""
    stream = chance.random() < 0.7
    body = asking(stream=stream, max_tokens=chance.randrange(1, TOKENS_MAX), messages=LONG_QUESTION)
    content, address = json.dumps(body).encode(), urlsplit(user.url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {user.key}\r\n"
        f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    lines = chance.randrange(LINES_MAX) if stream and chance.random() < 0.5 else None
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        async with asyncio.timeout(LEAVE_AT_LAST_S if lines is not None else chance.random() * patience_s):
            writer.write(head.encode() + content)
            status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
            assert status in (200, 502, 503, 504), status  # a machine that is very busy may refuse some, for now
            for _ in range(lines if lines is not None else LINES_MAX * TOKENS_MAX):
                if not await reader.readline():
                    break
    except TimeoutError:
        assert lines is None, "no answer"
    finally:
        if chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


async def crowd(users: Sequence[User], leavers: int, chance: random.Random, patience_s: float) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await leave(users[number % len(users)], chance, patience_s)

    async with asyncio.TaskGroup() as tasks:
        for number in range(leavers):
            tasks.create_task(one(number))


@pytest.mark.parametrize(
    ("cancels", "customers_count"),
    [(0, 4), pytest.param(10_000, 20, marks=[pytest.mark.torture, pytest.mark.timeout(7_200)])],
)
async def test_who_leaves_at_any_moment_leaves_nothing_behind(
    stack: RunningStack, fresh_user: NewUser, engine: Callable[[str], float], cancels: int, customers_count: int
) -> None:
    """A hundred who leave, or as many as it takes until so many have cancelled something that the engine worked on."""
    chance = random.Random(cancels)
    customers = [Customer(fresh_user()) for _ in range(customers_count)]
    users = [customer.user for customer in customers]
    for user in users:
        unlimit(stack, user)

    def is_quiet() -> bool:
        return engine("slots_busy") == engine("queue_depth") == 0 and all(u.wallet().held == 0 for u in users)

    patience_s = PATIENCE_S
    await crowd(users, WARM_UP, chance, patience_s)
    until(is_quiet, what="the first have left nothing")
    server, engines = stack.pid("triton"), {p.pid for p in engine_processes(stack, CHAT_BUILDS)}
    files, memory = descriptors(stack), set(regions(stack.stack.layout.stack_id))

    before, leavers, told = engine("cancelled_total"), 0, 0.0
    while not leavers or told < cancels:
        await crowd(users, BATCH, chance, patience_s)
        leavers, told_before, told = leavers + BATCH, told, engine("cancelled_total") - before
        patience_s *= EARLIER if told - told_before < BATCH / 2 else LATER
    until(is_quiet, what="slots, queue and holds are free")
    print(f"{leavers} left; the engine was told {told:.0f} times")
    check_books(stack, customers)
    assert stack.pid("triton") == server, f"tritonserver died: {stack.log('triton')}"
    assert {p.pid for p in engine_processes(stack, CHAT_BUILDS)} == engines
    assert set(regions(stack.stack.layout.stack_id)) <= memory

    def is_closed() -> bool:
        return all(now <= files[program] + SPARE_DESCRIPTORS for program, now in descriptors(stack).items())

    until(is_closed, what="descriptors are closed")
