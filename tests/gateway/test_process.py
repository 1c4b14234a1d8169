"""`python -m services.gateway` as it is run: it starts, serves, and drains on SIGTERM without losing a request."""

import asyncio
import os
import signal
import sys
from typing import Any

import httpx

from tests.conftest import ROOT, Components
from tests.gateway.harness import IDENTITY_KEYS, PEPPERS, Backend, Directory
from tests.gateway.outages import DEADLINE_S, eventually, free_port

CHAT = "/v1/chat/completions"


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
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "TOLLGATE_GATEWAY_LISTEN": f"127.0.0.1:{port}",
            "TOLLGATE_GATEWAY_INTERNAL_LISTEN": f"127.0.0.1:{free_port()}",
            "TOLLGATE_GATEWAY_DATABASE_URL": database_url,
            "TOLLGATE_REDIS_URL": components.redis_url,
            "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
            "TOLLGATE_API_KEY_PEPPERS": PEPPERS,
            **{f"TOLLGATE_{s}_URL": backend.url for s in ("AUTH", "BILLING", "CHAT", "INFERENCE")},
        },
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:

            async def is_up() -> bool:
                try:
                    return (await http.get("/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(is_up)
            checks = (await http.get("/readyz")).json()["checks"]
            assert (checks["redis"], checks["postgres"]) == ("ok", "ok")  # also under uvloop
            request = asyncio.create_task(http.post(CHAT, headers=key.headers))
            await asyncio.wait_for(entered.wait(), DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
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
