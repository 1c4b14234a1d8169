"""The line between the flags and Unleash, which tests cut and mend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

DEADLINE_S = 60


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, "the condition did not come true"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@dataclass
class Line:
    """A TCP relay to Unleash on a port of its own, which stays the same when it is cut and mended."""

    target: str
    port: int = 0
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _answer: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def mend(self) -> None:
        """Listen, and relay what comes."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Refuse connections, and drop the present ones."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.close()
            await self._server.wait_closed()
            self._server = None

    async def answer_instead(self, page: bytes) -> None:
        """Like a captive portal: HTTP 200 with a page of its own, to whatever is asked."""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n"
        self._answer = head.encode() + b"Connection: close\r\n\r\n" + page

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._answer is not None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer)
                await writer.drain()
                return
            parts = urlsplit(self.target)
            there, back = await asyncio.open_connection(parts.hostname, parts.port)
            self._open.add(back)
            try:
                await asyncio.gather(_pump(reader, back), _pump(there, writer))
            finally:
                self._open.discard(back)
                back.close()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            self._open.discard(writer)
            writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65_536):
        sink.write(data)
        await sink.drain()
    sink.close()
