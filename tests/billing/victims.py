"""What dies in the torture: billing's processes and their PostgreSQL. What died is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from deploy.local.errors import LaunchError, NotReady
from deploy.local.ports import pick_port
from deploy.local.stack import Stack
from deploy.local.state import Layout
from services.billing.ledger.failpoints import Failpoint
from tests.billing.harness import ROOT, migrate, service_process
from tests.billing.trap import Trap, Victim, WirePoint

PROCESSES = 2
PATIENCE_S = 300.0
# What was abandoned is settled soon; and so are live holds, whose settlements then come late.
SETTINGS = {"TOLLGATE_BILLING_HOLD_GRACE_S": "0.5", "TOLLGATE_BILLING_RECONCILE_INTERVAL_S": "0.5"}


class Victims:
    """PostgreSQL of its own, and billing processes that reach it through traps. What dies is started again."""

    def __init__(self, state: Path) -> None:
        self.stack = Stack(Layout(ROOT, state), 1, {})
        self.owner_url = ""
        self.traps: list[Trap] = []
        self._ports: list[tuple[int, int]] = []
        self._processes: list[Any] = []
        self._contexts: list[ExitStack] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.stack.start_data_stores)
        try:
            self.owner_url = self.stack.postgres.url()
            await asyncio.to_thread(migrate, self.owner_url)
            for number in range(PROCESSES):
                trap = Trap("127.0.0.1", self.stack.postgres.port, partial(self.kill, number))
                await trap.start()
                self.traps.append(trap)
                self._ports.append((pick_port(), pick_port()))
                self._contexts.append(ExitStack())
                self._processes.append(None)
            yield
        finally:
            for context in self._contexts:
                context.close()
            for trap in self.traps:
                await trap.stop()
            await asyncio.to_thread(self.stack.down)

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{grpc}" for _, grpc in self._ports]

    def _start(self, number: int, program: Sequence[str] = ("services.billing",)) -> None:
        self._contexts[number].close()
        parts = urlsplit(self.owner_url)
        netloc = f"{parts.username}:{parts.password}@127.0.0.1:{self.traps[number].port}"
        url = urlunsplit(parts._replace(netloc=netloc))
        process = service_process(url, *self._ports[number], SETTINGS, program)
        self._processes[number] = self._contexts[number].enter_context(process)

    async def start_billing(self) -> None:
        """Start what does not run, and wait for it."""
        for number, process in enumerate(self._processes):
            if process is None or process.poll() is not None:
                self._start(number)
        for _, grpc in self._ports:
            await eventually(partial(listens, grpc), "billing's start")

    def kill(self, number: int, victim: Victim) -> None:
        """SIGKILL, at once."""
        if victim == "billing":
            self._processes[number].kill()
            self._processes[number].wait()
        else:
            os.kill(int((self.stack.postgres.data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    async def recovered(self) -> None:
        """Wait for PostgreSQL to answer, and for billing."""

        async def answers() -> bool:
            try:
                await asyncio.to_thread(self.stack.postgres.check)
            except (NotReady, LaunchError):
                return False
            return True

        await eventually(answers, "PostgreSQL's recovery")
        await self.start_billing()

    async def spring(self, point: WirePoint, number: int) -> None:
        """Set the trap, wait until it has sprung, and until all runs again."""
        trap = self.traps[number]
        trap.set(point)
        async with asyncio.timeout(PATIENCE_S):
            await trap.sprung.wait()
        await self.recovered()

    async def die_at(self, name: Failpoint, number: int, times: int) -> None:
        """Replace a process by one that kills itself at a failpoint; wait for that, and for a new one."""
        self.kill(number, "billing")
        await self._forget_leader(number)
        self._start(number, ("tests.billing.failing_service", name, str(times)))
        process = self._processes[number]

        async def died() -> bool:
            return process.poll() is not None

        async def led_or_died() -> bool:
            return await died() or await self._leads(number)

        if name == "shard_released":  # a term ends with its connection, or at once when another was first
            await eventually(led_or_died, "leadership of a shard")
            if not await died():
                self.kill(number, "postgres")
        await eventually(died, f"{name} for the {times}. time")
        assert process.poll() == -signal.SIGKILL
        await self.recovered()

    async def _forget_leader(self, number: int) -> None:
        """The one that is dead now had the same address."""
        sql = f"UPDATE billing.shard SET leader = '' WHERE leader = '{self.addresses[number]}'"
        await asyncio.to_thread(self.stack.postgres.execute, sql, database="tollgate")

    async def _leads(self, number: int) -> bool:
        sql = f"SELECT count(*) FROM billing.shard WHERE leader = '{self.addresses[number]}'"
        return int(await asyncio.to_thread(self.stack.postgres.execute, sql, database="tollgate")) > 0


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait for it, on a machine that recovers slowly."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {PATIENCE_S} s"
        await asyncio.sleep(0.05)


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
