"""Clients that ask, and then take nothing of the answer."""

import asyncio
import socket

import psutil
import pytest

from tests.conftest import Components
from tests.gateway.harness import Backend, gateway, settings
from tests.gateway.outages import eventually

PAGE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n"
PAGES = 12  # far more bytes than the kernel takes for one connection


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's")
async def test_a_client_that_never_reads_is_hung_up_on(
    components: Components, database_url: str, backend: Backend
) -> None:
    configured = settings(components.redis_url, database_url, backend.url, gateway_idle_timeout_s=0.5)
    async with gateway(configured) as running:
        port = int(running.url.rpartition(":")[2])
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        own = client.getsockname()[1]

        def is_served() -> bool:
            return any(
                c.laddr.port == port and c.raddr and c.raddr.port == own
                for c in psutil.Process().net_connections("tcp4")
                if c.status in (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
            )

        await loop.sock_sendall(client, (PAGE + b"\r\n") * (PAGES - 1) + PAGE + b"connection: close\r\n\r\n")
        assert await loop.sock_recv(client, 12) == b"HTTP/1.1 200"
        assert is_served()
        await eventually(lambda: not is_served())
        client.close()
