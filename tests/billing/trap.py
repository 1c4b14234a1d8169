"""A relay between billing and PostgreSQL that kills one of them at a message of a transaction."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 65_536

When = Literal["unsent", "unanswered"]
Victim = Literal["billing", "postgres"]


@dataclass(frozen=True, slots=True)
class WirePoint:
    """A message of a transaction on its way from billing to PostgreSQL: who is killed as it is about to be sent, or
    once it was sent and before its answer arrives. `message` is its number after BEGIN, or "COMMIT"."""

    message: int | Literal["BEGIN", "COMMIT"]
    when: When
    victim: Victim

    def __str__(self) -> str:
        return f"{self.victim} dies with message {self.message} {self.when}"


# Every point on the wire: what dies between two messages dies as it would at the first of them.
WIRE_POINTS = tuple(
    WirePoint(message, when, victim)
    for message in ("BEGIN", 1, 2, 3, "COMMIT")
    for when in ("unsent", "unanswered")
    for victim in ("billing", "postgres")
)
# After COMMIT and before its acknowledgement, and in the middle of a transaction.
WIRE_POINTS_IN_SHORT = (WirePoint("COMMIT", "unanswered", "billing"), WirePoint(2, "unsent", "postgres"))


class Trap:
    """A relay between one billing process and PostgreSQL, which can be set to kill at a point."""

    def __init__(self, host: str, port: int, kill: Callable[[Victim], None]) -> None:
        self._target = (host, port)
        self._kill = kill
        self._set: WirePoint | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.sprung = asyncio.Event()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def set(self, point: WirePoint | None) -> None:
        self._set = point
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
                point = self._set
                here: set[object] = {number} | ({"BEGIN"} if begins else set()) | ({"COMMIT"} if is_commit else set())
                if point is None or number is None or point.message not in here:
                    number = None if is_commit else number
                    writer.write(data)
                    await writer.drain()
                    continue
                self._set = None
                answers.cancel()
                if point.when == "unanswered":
                    writer.write(data)
                    await writer.drain()
                self._kill(point.victim)
                self.sprung.set()
                return


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
