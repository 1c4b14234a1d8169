"""The bounded pool of argon2 threads."""

import asyncio
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import argon2
import pytest
from prometheus_client import CollectorRegistry

from services.auth.errors import PasswordQueueFull
from services.auth.service.passwords import Passwords
from shared.telemetry import AuthMetrics
from tests.auth.harness import PASSWORD, Auth, running
from tests.conftest import Components


class Gate(argon2.PasswordHasher):
    """argon2 that waits for a gate to open before it hashes, so that a queue is as long as the test wants."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=64, parallelism=1)
        self.opened = threading.Event()
        self.opened.set()

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - argon2's own name
        assert self.opened.wait(30)
        return super().verify(hash, password)


@contextmanager
def pool(threads: int, queue_max: int) -> Iterator[tuple[Passwords, Gate, AuthMetrics]]:
    gate, metrics = Gate(), AuthMetrics(CollectorRegistry())
    passwords = Passwords(gate, threads=threads, queue_max=queue_max, nice=0, jobs=metrics.password_jobs)
    try:
        yield passwords, gate, metrics
    finally:
        gate.opened.set()
        passwords.close()


async def test_beyond_threads_and_queue_sign_ins_are_refused_at_once_and_the_rest_finish() -> None:
    with pool(threads=1, queue_max=2) as (passwords, gate, metrics):
        stored = await passwords.hash(PASSWORD)
        gate.opened.clear()
        waiting = [asyncio.create_task(passwords.verify(stored, PASSWORD)) for _ in range(3)]
        await asyncio.sleep(0)
        assert metrics.password_jobs._value.get() == 3
        with pytest.raises(PasswordQueueFull) as refused:
            await passwords.verify(stored, PASSWORD)
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
        gate.opened.set()
        assert [v.correct for v in await asyncio.gather(*waiting)] == [True] * 3
        assert (await passwords.verify(stored, PASSWORD)).correct
        assert metrics.password_jobs._value.get() == 0


async def test_a_cancelled_sign_in_gives_its_place_back_only_when_its_thread_is_done() -> None:
    with pool(threads=1, queue_max=0) as (passwords, gate, _):
        stored = await passwords.hash(PASSWORD)
        gate.opened.clear()
        running_one = asyncio.create_task(passwords.verify(stored, PASSWORD))
        await asyncio.sleep(0.01)
        running_one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running_one
        with pytest.raises(PasswordQueueFull):
            await passwords.verify(stored, PASSWORD)
        gate.opened.set()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert (await passwords.verify(stored, PASSWORD)).correct
                    break
                except PasswordQueueFull:
                    await asyncio.sleep(0.005)


async def test_a_full_queue_answers_503_with_retry_after(owner_url: str, components: Components) -> None:
    changes = {"auth_argon2_threads": 1, "auth_argon2_queue_max": 1, "auth_argon2_memory_kib": 65_536}
    async with running(owner_url, components.redis_url, **changes) as auth:
        answers = await asyncio.gather(*(auth.login(f"nobody-{n}") for n in range(12)))
        statuses = [a.status_code for a in answers]
        assert set(statuses) == {401, 503}
        full = next(a for a in answers if a.status_code == 503)
        assert (full.json()["code"], full.headers["retry-after"]) == ("sign_in_busy", "1")


async def test_a_login_flood_does_not_stop_other_work(auth: Auth) -> None:
    user = await auth.user()
    flood = [asyncio.create_task(auth.login(f"nobody-{n}")) for n in range(50)]
    assert (await auth.call("GET", "/api/v1/keys", token=user.access_token)).status_code == 200
    assert {a.status_code for a in await asyncio.gather(*flood)} <= {401, 503}


async def test_a_flood_of_sign_ins_is_turned_away_at_the_door_and_others_are_served(
    owner_url: str, components: Components
) -> None:
    """Before a connection of the database is taken, and without an error but the honest one."""
    async with running(owner_url, components.redis_url, auth_argon2_threads=1, auth_argon2_queue_max=2) as auth:
        user, other = await auth.user(), await auth.user()
        flood = [auth.login(user.username) for _ in range(60)]
        refresh = auth.call("POST", "/api/v1/auth/refresh", json={"refresh_token": other.refresh_token})
        key = auth.call("POST", "/api/v1/keys", token=other.access_token, json={"name": "k"})
        *answers, refreshed, made = await asyncio.gather(*flood, refresh, key)
        found = Counter((answer.status_code, answer.json().get("code")) for answer in answers)
        assert set(found) <= {(200, None), (503, "sign_in_busy")}
        assert found[200, None] >= 1
        assert found[503, "sign_in_busy"] >= 1
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
        assert (refreshed.status_code, made.status_code) == (200, 201)
        assert (await auth.login(user.username)).status_code == 200


class Priority(argon2.PasswordHasher):
    """argon2 that notes how willingly its thread yields."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=64, parallelism=1)
        self.nices: set[int] = set()

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - argon2's own name
        self.nices.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return super().verify(hash, password)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
async def test_the_threads_yield_to_the_loop_and_leave_a_core_to_everybody_else(auth: Auth) -> None:
    hasher, own = Priority(), os.getpriority(os.PRIO_PROCESS, 0)
    nice = min(own + 5, 19)
    jobs = AuthMetrics(CollectorRegistry()).password_jobs
    passwords = Passwords(hasher, threads=2, queue_max=8, nice=nice, jobs=jobs)
    try:
        stored = await passwords.hash(PASSWORD)
        await asyncio.gather(*(passwords.verify(stored, PASSWORD) for _ in range(8)))
    finally:
        passwords.close()
    assert hasher.nices == {nice}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    assert auth.settings.auth_argon2_threads == max(1, len(os.sched_getaffinity(0)) - 1)
