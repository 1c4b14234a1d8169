"""Clients that ask, and then take nothing of the answer."""

import asyncio
import socket
from typing import Any

import psutil
import pytest

from services.gateway.replicas import FAILURES_MAX
from tests.conftest import Components
from tests.gateway.harness import Backend, Directory, Gateway, gateway, settings
from tests.gateway.outages import eventually

PAGE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n"
PAGES = 12  # far more bytes than the kernel takes for one connection
CHAT = "/v1/chat/completions"


async def client_of(running: Gateway) -> socket.socket:
    """A client that takes few bytes at once."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.setblocking(False)
    port = int(running.url.rpartition(":")[2])
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return client


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's")
async def test_a_client_that_never_reads_is_hung_up_on(
    components: Components, database_url: str, backend: Backend
) -> None:
    configured = settings(components.redis_url, database_url, backend.url, gateway_idle_timeout_s=0.5)
    async with gateway(configured) as running:
        loop = asyncio.get_running_loop()
        client = await client_of(running)
        port, own = client.getpeername()[1], client.getsockname()[1]

        def is_served() -> bool:
            return any(
                c.laddr.port == port and c.raddr and c.raddr.port == own
                for c in psutil.Process().net_connections("tcp4")
                if c.status in (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
            )

        await eventually(is_served)
        await loop.sock_sendall(client, (PAGE + b"\r\n") * (PAGES - 1) + PAGE + b"connection: close\r\n\r\n")
        assert await loop.sock_recv(client, 12) == b"HTTP/1.1 200"
        await eventually(lambda: not is_served())
        client.close()


async def test_clients_that_never_read_do_not_speak_against_the_service(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    begun = 0

    async def pour(_scope: Any, _receive: Any, send: Any) -> None:
        nonlocal begun
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        begun += 1
        for _ in range(512):
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    key = await directory.create_key(limits={"minute": 1_000, "hour": 1_000, "day": 1_000, "concurrency": 50})
    configured = settings(components.redis_url, database_url, backend.url, gateway_idle_timeout_s=4)
    async with gateway(configured) as running:
        assert (await running.http.post(CHAT, headers=key.headers)).status_code == 200
        backend.handlers[CHAT] = pour
        clients = [await client_of(running) for _ in range(2 * FAILURES_MAX)]
        asked = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: {key.secret}\r\ncontent-length: 0\r\n\r\n"
        for client in clients:
            await asyncio.get_running_loop().sock_sendall(client, asked.encode())
        await eventually(lambda: begun == len(clients))

        async def are_dropped() -> bool:
            return await running.metric("tollgate_http_requests_in_flight", service="gateway") == 0

        await eventually(are_dropped)
        backend.handlers.clear()
        assert (await running.http.post(CHAT, headers=key.headers)).status_code == 200
        for client in clients:
            client.close()
