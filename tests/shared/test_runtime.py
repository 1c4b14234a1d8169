"""A service starts in order, keeps its tasks alive, and leaves only after it has answered what it took."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deploy.local.ports import pick_port

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60


def environment(**extra: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "TOLLGATE_IDENTITY_KEYS": f"a:{base64.b64encode(b'a' * 32).decode()}", **extra}


class Running:
    """The process and its log, line by line."""

    def __init__(self, process: Process, url: str) -> None:
        self.process, self.url, self.events = process, url, list[str]()

    async def wait_for(self, event: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            while event not in self.events:
                line = await self.process.stdout.readline()
                assert line, f"ended before {event}; saw {self.events}"
                self.events.append(json.loads(line)["event"])


@pytest.fixture
async def service() -> AsyncIterator[Running]:
    port = pick_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.shared.runtime_service"),
        cwd=ROOT,
        env=environment(TOLLGATE_TEST_HTTP_LISTEN=f"127.0.0.1:{port}"),
        stdout=PIPE,
    )
    running = Running(process, f"http://127.0.0.1:{port}")
    await running.wait_for("started")
    yield running
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def test_on_sigterm_a_request_in_flight_is_answered_and_resources_close(service: Running) -> None:
    async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False) as client:
        request = asyncio.create_task(client.get(f"{service.url}/slow"))
        await service.wait_for("slow_begun")
        service.process.send_signal(signal.SIGTERM)
        assert (await request).json() == {"finished": True}
    await service.wait_for("cancellation_missed")  # and the task is ended all the same
    await service.wait_for("resource_closed")
    await service.wait_for("stopped")
    async with asyncio.timeout(DEADLINE_S):
        assert await service.process.wait() == 0


async def test_a_task_that_fails_is_begun_again(service: Running) -> None:
    await service.wait_for("task_running")
    assert service.events.count("task_failed") == 2


def test_missing_settings_are_named_one_line_each() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.shared.runtime_service"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 2
    assert sorted(result.stderr.splitlines()) == [
        "setting TOLLGATE_IDENTITY_KEYS: Field required",
        "setting TOLLGATE_TEST_HTTP_LISTEN: Field required",
    ]
