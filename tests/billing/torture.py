"""Operations at random against billing processes that die, and a PostgreSQL that dies, at every point of a transaction.

What must come of it does not depend on where anything died: each operation that was answered happened once, and each
that is sent again until it is answered happens once. So the sums of every wallet are known from the answers alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

from deploy.local.errors import LaunchError, NotReady
from deploy.local.stack import Stack
from deploy.local.state import Layout
from shared.errors import TollgateError
from shared.grpc import Caller
from shared.ids import uuid7
from shared.metering import REFUSAL_STATUSES
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from tests.billing.harness import MODEL, ROOT, caller, grant, ledger_on, migrate, service_process

PROCESSES = 2
WORKERS = 16
RICH, POOR = 10**12, 400
CALL_TIMEOUT_S = 3.0
PATIENCE_S = 120.0
CHUNK_BYTES = 65_536
# What was abandoned is settled soon; and so are live holds, whose settlements then come late.
SETTINGS = {"TOLLGATE_BILLING_HOLD_GRACE_S": "0.5", "TOLLGATE_BILLING_RECONCILE_INTERVAL_S": "0.5"}

When = Literal["unsent", "unanswered"]
Victim = Literal["billing", "postgres"]


@dataclass(frozen=True, slots=True)
class Failpoint:
    """A message of a transaction on its way from billing to PostgreSQL: who is killed as it is about to be sent, or
    once it was sent and before its answer arrives. `message` is its number after BEGIN, or "COMMIT"."""

    message: int | Literal["BEGIN", "COMMIT"]
    when: When
    victim: Victim

    def __str__(self) -> str:
        return f"{self.victim} dies with message {self.message} {self.when}"


# Every failpoint there is: what dies between two messages dies as it would at the first of them.
FAILPOINTS = tuple(
    Failpoint(message, when, victim)
    for message in ("BEGIN", 1, 2, 3, "COMMIT")
    for when in ("unsent", "unanswered")
    for victim in ("billing", "postgres")
)
# After COMMIT and before its acknowledgement, and in the middle of a transaction.
FAILPOINTS_IN_SHORT = (Failpoint("COMMIT", "unanswered", "billing"), Failpoint(2, "unsent", "postgres"))


class Trap:
    """A relay between one billing process and PostgreSQL, which can be set to kill at a failpoint."""

    def __init__(self, host: str, port: int, kill: Callable[[Victim], None]) -> None:
        self._target = (host, port)
        self._kill = kill
        self._set: Failpoint | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.sprung = asyncio.Event()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def set(self, failpoint: Failpoint | None) -> None:
        self._set = failpoint
        self.sprung.clear()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        finally:
            task.add_done_callback(self._tasks.discard)
        answers = asyncio.create_task(_relay(up_reader, writer))
        try:
            await self._requests(reader, up_writer, answers)
        finally:
            answers.cancel()
            for side in (writer, up_writer):
                side.transport.abort()

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: asyncio.Task[None]
    ) -> None:
        number: int | None = None
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                begins = b"BEGIN" in data
                number = 0 if begins else (None if number is None else number + 1)
                is_commit = b"COMMIT;" in data
                failpoint = self._set
                here: set[object] = {number} | ({"BEGIN"} if begins else set()) | ({"COMMIT"} if is_commit else set())
                if failpoint is None or number is None or failpoint.message not in here:
                    number = None if is_commit else number
                    writer.write(data)
                    await writer.drain()
                    continue
                self._set = None
                answers.cancel()
                if failpoint.when == "unanswered":
                    writer.write(data)
                    await writer.drain()
                self._kill(failpoint.victim)
                self.sprung.set()
                return


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@dataclass(slots=True)
class Expected:
    """What a wallet must have been charged: between these, which differ only where an answer never came."""

    low: int = 0
    high: int = 0


@dataclass(slots=True)
class Customers:
    """Workers that hold, report, settle, void and abandon; and what must have come of it."""

    stubs: Sequence[LedgerStub]
    callers: Sequence[Caller]
    wallets: Sequence[UUID]
    expected: dict[UUID, Expected] = field(default_factory=dict)
    done: int = 0
    refused: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def worker(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stopping.is_set():
            org_id, tokens = rng.choice(self.wallets), rng.randint(1, 50)
            hold_id = str(uuid7())
            request = pb.HoldRequest(
                hold_id=hold_id,
                org_id=str(org_id),
                user_id=str(uuid4()),
                plan="default",
                model=MODEL,
                worst_case=pb.Usage(output_tokens=tokens),
                ttl_ms=rng.choice((1_000, 3_000, 8_000)),
                request_id="req_torture",
            )
            try:
                await self.until_answered(rng, "Hold", request)
            except TollgateError as e:
                if e.code not in ("insufficient_quota", "credits_reserved"):
                    raise
                self.refused += 1
                continue
            low, high = await self._finish(rng, hold_id, str(org_id), tokens)
            expected = self.expected.setdefault(org_id, Expected())
            expected.low += low
            expected.high += high
            self.done += 1

    async def _finish(self, rng: random.Random, hold_id: str, org_id: str, tokens: int) -> tuple[int, int]:
        """End a hold in one of the ways there are: the least and the most that it must have cost."""
        way = rng.random()
        if way < 0.15:
            with contextlib.suppress(TollgateError):  # its time was over first: nothing was produced
                await self.until_answered(rng, "Void", pb.VoidRequest(hold_id=hold_id, org_id=org_id, reason="test"))
            return 0, 0
        if way < 0.3:
            return await self._abandon(rng, hold_id, org_id, rng.randint(1, tokens))
        used = rng.randint(0, tokens + 5)
        request = pb.SettleRequest(
            hold_id=hold_id, org_id=org_id, usage=pb.Usage(output_tokens=used), build="b", finish_reason="stop"
        )
        copies = 1 + (way > 0.85)
        replies = await asyncio.gather(*(self.until_answered(rng, "Settle", request) for _ in range(copies)))
        assert all(reply == replies[0] for reply in replies)
        assert replies[0].cost_nano == used
        return used, used

    async def _abandon(self, rng: random.Random, hold_id: str, org_id: str, used: int) -> tuple[int, int]:
        """One report, and never again a word: the sweeper settles it."""
        usage = pb.Usage(output_tokens=used)
        request = pb.HeartbeatRequest(hold_id=hold_id, org_id=org_id, usage=usage, ttl_ms=1_000)
        try:
            await self.until_answered(rng, "Heartbeat", request)
        except TollgateError as e:
            if e.code != "hold_resolved":
                raise
            return 0, used  # an earlier attempt may have arrived before the hold's time was over
        return used, used

    async def until_answered(self, rng: random.Random, method: str, request: Any) -> Any:
        """The same message to any process until one decides. Raises the ledger's refusal."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                number = rng.randrange(len(self.stubs))
                try:
                    stub = getattr(self.stubs[number], method)
                    return await self.callers[number].call(stub, request, timeout_s=CALL_TIMEOUT_S)
                except TollgateError as e:
                    if e.status in REFUSAL_STATUSES:
                        raise
                    await asyncio.sleep(rng.uniform(0.02, 0.1))

    async def progress(self, requests: int) -> None:
        goal = self.done + requests

        async def reached() -> bool:
            return self.done >= goal

        await eventually(reached, f"{requests} requests")


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
                self._ports.append((free_port(), free_port()))
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

    async def start_billing(self) -> None:
        """Start what does not run, and wait for it."""
        for number, process in enumerate(self._processes):
            if process is None or process.poll() is not None:
                self._contexts[number].close()
                parts = urlsplit(self.owner_url)
                netloc = f"{parts.username}:{parts.password}@127.0.0.1:{self.traps[number].port}"
                url = urlunsplit(parts._replace(netloc=netloc))
                process = self._contexts[number].enter_context(service_process(url, *self._ports[number], SETTINGS))
                self._processes[number] = process
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

    async def spring(self, failpoint: Failpoint, number: int) -> None:
        """Set the trap, wait until it has sprung, and until all runs again."""
        trap = self.traps[number]
        trap.set(failpoint)
        async with asyncio.timeout(PATIENCE_S):
            await trap.sprung.wait()
        await self.recovered()


@asynccontextmanager
async def customers_of(victims: Victims, wallets: Sequence[UUID]) -> AsyncIterator[Customers]:
    """Wallets with credits, rich ones and poor ones, and workers on them."""
    async with ledger_on(victims.owner_url) as ledger:
        for number, org_id in enumerate(wallets):
            await ledger.writer.submit(grant(org_id, POOR if number % 4 == 3 else RICH))
    await victims.start_billing()
    callers = [caller(address) for address in victims.addresses]
    customers = Customers([LedgerStub(c.channel) for c in callers], callers, wallets)
    try:
        yield customers
    finally:
        for each in callers:
            await each.close()


async def check(victims: Victims, customers: Customers) -> None:
    """All holds ended, all books add up, nobody was frozen, and every wallet paid what the answers say."""
    async with ledger_on(victims.owner_url) as ledger:

        async def ended() -> bool:
            return int(await ledger.pool.fetchval("SELECT count(*) FROM billing.open_hold")) == 0

        await eventually(ended, "the end of what was abandoned")
        report = await ledger.verified()
        assert report.holds >= customers.done
        for org_id, expected in customers.expected.items():
            spent = (await ledger.wallet(org_id)).spent
            assert expected.low <= spent <= expected.high, (org_id, spent, expected)
        assert await ledger.pool.fetchval("SELECT count(*) FROM billing.discrepancy") == 0


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait for it, on a machine that recovers slowly."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {PATIENCE_S} s"
        await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
