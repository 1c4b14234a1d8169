"""`python -m services.gateway` as it is run: it starts, serves, and drains on SIGTERM without losing a request."""

import asyncio
import os
import signal
import sys
from typing import Any

import httpx

from deploy.local.ports import pick_port
from tests.conftest import ROOT, Components
from tests.gateway.fleet import PATIENT
from tests.gateway.harness import IDENTITY_KEYS, PEPPERS, Backend, Directory, Key
from tests.gateway.outages import DEADLINE_S, eventually

CHAT = "/v1/chat/completions"
START_DEADLINE_S = 120.0


async def start(port: int, components: Components, database_url: str, backend: Backend) -> asyncio.subprocess.Process:
    """The gateway as a process of its own."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "TOLLGATE_GATEWAY_LISTEN": f"127.0.0.1:{port}",
            "TOLLGATE_GATEWAY_INTERNAL_LISTEN": f"127.0.0.1:{pick_port()}",
            "TOLLGATE_GATEWAY_DATABASE_URL": database_url,
            "TOLLGATE_REDIS_URL": components.redis_url,
            "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
            "TOLLGATE_API_KEY_PEPPERS": PEPPERS,
            "TOLLGATE_GATEWAY_DRAIN_IDLE_S": "10",  # a client on a busy machine may be late with its next request
            **PATIENT,
            **{f"TOLLGATE_{s}_URL": backend.url for s in ("AUTH", "BILLING", "CHAT", "INFERENCE")},
        },
        stdout=asyncio.subprocess.PIPE,
    )


async def test_it_serves_and_drains(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    gate, entered = asyncio.Event(), asyncio.Event()

    async def stream(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
        entered.set()
        await gate.wait()
        await send({"type": "http.response.body", "body": b"and done"})

    backend.handlers[CHAT] = stream
    key = await directory.create_key()
    port = pick_port()
    process = await start(port, components, database_url, backend)
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=START_DEADLINE_S, trust_env=False
        ) as http:

            async def is_up() -> bool:
                try:
                    return (await http.get("/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            async def reaches_its_stores() -> bool:
                checks = (await http.get("/readyz")).json()["checks"]
                return (checks["redis"], checks["postgres"]) == ("ok", "ok")  # also under uvloop

            await eventually(is_up, START_DEADLINE_S)
            await eventually(reaches_its_stores)
            request = asyncio.create_task(http.post(CHAT, headers=key.headers))
            await asyncio.wait_for(entered.wait(), DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            await eventually(lambda: _is_closed(port))
            assert process.returncode is None
            gate.set()
            assert (await request).text == "begun and done"
        out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 0
        assert key.secret not in out.decode()
        assert '"event": "stopped"' in out.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Customer:
    """Asks one gateway after another over connections that it keeps, and goes to the next only when refused."""

    def __init__(self, ports: list[int], key: Key) -> None:
        self.ports = ports
        self.answered = 0
        self.lost: list[str] = []
        length = b"content-length: 2\r\n\r\n{}"
        self._request = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: {key.secret}\r\n".encode() + length

    async def run(self, until: asyncio.Event) -> None:
        while not until.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[0])
            except OSError:
                self.ports.append(self.ports.pop(0))  # nothing was sent: the other one
                await asyncio.sleep(0.01)
                continue
            while not until.is_set() and await self._ask(reader, writer):
                pass
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection may be used again."""
        if reader.at_eof():
            return False
        writer.write(self._request)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(v) for k, _, v in (h.partition(b": ") for h in head.split(b"\r\n")) if k == b"content-length"
            )
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as e:
            self.lost.append(type(e).__name__)
            return False
        if head.startswith(b"HTTP/1.1 200"):
            self.answered += 1
        else:
            self.lost.append(head.decode())
        return b"connection: close" not in head


async def test_a_rolling_restart_loses_no_request(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    """Two gateways, restarted one after the other under load. Every request that was sent is answered."""
    limits = {"minute": 1_000_000, "hour": 1_000_000, "day": 1_000_000}
    key = await directory.create_key(limits=limits)
    ports = [pick_port(), pick_port()]
    running = [await start(port, components, database_url, backend) for port in ports]
    drained = [asyncio.create_task(process.communicate()) for process in running]
    done = asyncio.Event()
    try:
        for port in ports:
            await eventually(lambda port=port: _listens(port), START_DEADLINE_S)  # type: ignore[misc]
        customers = [Customer([*ports[i % 2 :], *ports[: i % 2]], key) for i in range(6)]
        asking = [asyncio.create_task(customer.run(done)) for customer in customers]
        for i, port in enumerate(ports):
            before = sum(c.answered for c in customers)
            await eventually(lambda: sum(c.answered for c in customers) > before + 100, START_DEADLINE_S)  # noqa: B023 - used at once
            running[i].send_signal(signal.SIGTERM)
            await asyncio.wait_for(drained[i], START_DEADLINE_S)
            assert running[i].returncode == 0
            running[i] = await start(port, components, database_url, backend)
            drained[i] = asyncio.create_task(running[i].communicate())
            await eventually(lambda port=port: _listens(port), START_DEADLINE_S)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*asking)
        assert [c.lost for c in customers] == [[]] * len(customers)
    finally:
        done.set()
        for process in running:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*drained)


async def _is_closed(port: int) -> bool:
    return not await _listens(port)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
