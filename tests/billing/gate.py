"""A TCP relay that tests can shut, and that can lose an answer on its way: what networks do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK_BYTES = 65_536


class Gate:
    """Relays to a target. Shut, it drops its connections and refuses new ones."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._is_open = True
        self._lose_after: bytes | None = None
        self.lost = 0

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def shut(self) -> None:
        self._is_open = False
        for connection in list(self._connections):
            connection.transport.abort()

    def open(self) -> None:
        self._is_open = True

    def lead_to(self, host: str, port: int) -> None:
        """Another target from now on; connections to the former one break."""
        self._target = (host, port)
        self.shut()
        self.open()

    def lose_answer(self, after: bytes = b"") -> None:
        """The next message that contains `after` arrives; the connection breaks before its answer is relayed."""
        self._lose_after = after

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.shut()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_open:
            writer.transport.abort()
            return
        target = self._target
        try:
            up_reader, up_writer = await asyncio.open_connection(*target)
        except OSError:
            writer.transport.abort()
            return
        both = (writer, up_writer)
        if not self._is_open or target != self._target:  # meanwhile it was shut, or leads elsewhere
            for side in both:
                side.transport.abort()
            return
        self._connections.update(both)
        losing = asyncio.Event()
        try:
            await asyncio.gather(
                self._pump(reader, up_writer, losing), self._answers(up_reader, writer, losing), return_exceptions=True
            )
        finally:
            self._connections.difference_update(both)
            for side in both:
                side.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self._lose_after is not None and self._lose_after in data:
                    self._lose_after = None
                    losing.set()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if losing.is_set():
                    self.lost += 1
                    break
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def gate_to(host: str, port: int) -> AsyncIterator[Gate]:
    gate = Gate(host, port)
    await gate.start()
    try:
        yield gate
    finally:
        await gate.stop()
