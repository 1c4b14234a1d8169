"""Several gateways as processes of their own, and a client that is cheap enough to keep them busy."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from deploy.local.ports import pick_port
from tests.conftest import ROOT
from tests.gateway.harness import IDENTITY_KEYS, PEPPERS
from tests.gateway.outages import DEADLINE_S, eventually

# A busy test machine is not an outage.
PATIENT = {
    "TOLLGATE_GATEWAY_REDIS_TIMEOUT_MS": "20000",
    "TOLLGATE_GATEWAY_DATABASE_TIMEOUT_MS": "20000",
    "TOLLGATE_GATEWAY_CONNECT_TIMEOUT_MS": "20000",
}


@dataclass
class Client:
    """One connection, one request at a time."""

    port: int
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str, secret: str) -> int:
        """The status of a GET."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        if b"connection: close" in head:
            self.close()
        return int(head[9:12])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Process:
    """A gateway."""

    port: int
    process: asyncio.subprocess.Process

    def rss_bytes(self) -> int:
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Fleet:
    """Gateways that run."""

    processes: list[Process] = field(default_factory=list)

    @asynccontextmanager
    async def clients(self, each: int) -> AsyncIterator[list[Client]]:
        """So many connections to each gateway, in turn."""
        made = [Client(process.port) for _ in range(each) for process in self.processes]
        try:
            yield made
        finally:
            for client in made:
                client.close()


@dataclass(frozen=True)
class Answer:
    """What one request got, and when it was sent and answered (monotonic, s)."""

    sent_s: float
    received_s: float
    status: int


async def ask(client: Client, secret: str, path: str = "/v1/models") -> Answer:
    sent_s = time.monotonic()
    status = await client.get(path, secret)
    return Answer(sent_s, time.monotonic(), status)


@asynccontextmanager
async def fleet(count: int, redis_url: str, database_url: str, service_url: str, **env: str) -> AsyncIterator[Fleet]:
    """Start gateways and wait until they all serve, and know of each other."""
    async with AsyncExitStack() as stack:
        processes = []
        for _ in range(count):
            port = pick_port()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.gateway"),
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"],
                    "TOLLGATE_GATEWAY_LISTEN": f"127.0.0.1:{port}",
                    "TOLLGATE_GATEWAY_INTERNAL_LISTEN": f"127.0.0.1:{pick_port()}",
                    "TOLLGATE_GATEWAY_DATABASE_URL": database_url,
                    "TOLLGATE_REDIS_URL": redis_url,
                    "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
                    "TOLLGATE_API_KEY_PEPPERS": PEPPERS,
                    "TOLLGATE_GATEWAY_REPLICAS": str(count),
                    "TOLLGATE_GATEWAY_HEARTBEAT_INTERVAL_S": "0.2",
                    "TOLLGATE_GATEWAY_HEARTBEAT_TTL_S": "60",
                    "TOLLGATE_GATEWAY_LEASE_TTL_S": "600",  # what leaked stays to be seen
                    **PATIENT,
                    "TOLLGATE_GATEWAY_UNKNOWN_KEYS_PER_MINUTE": "1000000",  # a revoked key is one
                    **{f"TOLLGATE_{s}_URL": service_url for s in ("AUTH", "BILLING", "CHAT", "INFERENCE")},
                    **env,
                },
                stdout=asyncio.subprocess.DEVNULL,
            )
            stack.push_async_callback(_stop, process)
            processes.append(Process(port, process))
        await asyncio.gather(*(eventually(partial(_serves, p.port), 3 * DEADLINE_S) for p in processes))
        yield Fleet(processes)


async def _serves(port: int) -> bool:
    client = Client(port)
    try:
        return await client.get("/healthz", "") == 200
    except (OSError, asyncio.IncompleteReadError):
        return False
    finally:
        client.close()


async def _stop(process: asyncio.subprocess.Process) -> None:
    """At once: how a gateway drains is not what these tests are about."""
    if process.returncode is None:
        process.kill()
        await process.wait()
