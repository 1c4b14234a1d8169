"""The inference service as it is built for production, and a catalogue for it."""

import asyncio
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.inference.app import build
from services.inference.settings import Settings
from shared.clock import SystemClock
from shared.grpc import Caller
from shared.identity import HEADER, Identity, IdentityRing
from shared.rpc import inference_pb2, inference_pb2_grpc
from shared.runtime import Service
from shared.web import Readiness
from tests.inference.client import BackendClient

WAIT_S = 60.0
KEYS = f"test:{b64encode(secrets.token_bytes(32)).decode()}"
READY = inference_pb2.BUILD_STATE_READY
UNAVAILABLE = inference_pb2.BUILD_STATE_UNAVAILABLE

CATALOGUE = """
[models.frail]
kind = "chat"
description = "For breaking"
created = 1763596800
stable = "frail"
[models.frail.builds.frail]
engine = "llama.cpp"
quantization = "Q8_0"
context_tokens = 1024
slots = 2
"""
MORE = """
[models.frail.builds.{name}]
engine = "llama.cpp"
quantization = "Q8_0"
context_tokens = {context_tokens}
slots = 2
"""


class RunningService:
    """The service's own build, with what a neighbour would use to talk to it."""

    def __init__(
        self, service: Service, readiness: Readiness, ring: IdentityRing, repository: Path, triton_grpc: str
    ) -> None:
        self.triton_grpc = triton_grpc
        self._triton = BackendClient(triton_grpc)
        self.readiness = readiness
        self.ring = ring
        self.catalogue = repository / "catalogue.toml"
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(service.http[0].app), base_url="http://inference")
        assert service.grpc is not None
        self.port = service.grpc.add_insecure_port("127.0.0.1:0")
        self._caller = Caller(f"127.0.0.1:{self.port}", ring, service="chat")
        self._stub = inference_pb2_grpc.CatalogueStub(self._caller.channel)
        self.seen: list[tuple[str, int]] = []

    async def is_loaded(self, name: str) -> bool:
        return await self._triton.is_ready(name)

    async def close(self) -> None:
        await self._triton.close()
        await self._caller.close()
        await self.http.aclose()

    def headers(self, **claims: Any) -> dict[str, str]:
        """What the gateway signs for a caller."""
        return {HEADER: self.ring.sign(Identity(**claims))}

    def operator(self) -> dict[str, str]:
        return self.headers(kind="user", user_id="u", org_id="o", roles=("operator",))

    async def rpc(self, method: str, request: Any) -> Any:
        return await self._caller.call(getattr(self._stub, method), request, timeout_s=WAIT_S)

    async def list(self) -> inference_pb2.ListReply:
        reply = await self._caller.call(self._stub.List, inference_pb2.ListRequest())
        assert isinstance(reply, inference_pb2.ListReply)
        return reply

    async def builds(self) -> dict[str, inference_pb2.Build]:
        return {b.name: b for model in (await self.list()).models for b in model.builds}

    async def until(self, name: str, condition: Callable[[inference_pb2.Build], bool]) -> inference_pb2.Build:
        """Wait for a build to be as it should; remembers the states on the way."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = (await self.builds()).get(name)
            if found is not None:
                if not self.seen or self.seen[-1] != (name, found.state):
                    self.seen.append((name, found.state))
                if condition(found):
                    return found
            assert time.monotonic() < deadline, f"{name} is {found}"
            await asyncio.sleep(0.01)

    async def gone(self, name: str) -> None:
        """Wait until a build is neither listed nor loaded."""
        deadline = time.monotonic() + WAIT_S
        while name in await self.builds() or await self.is_loaded(name):
            assert time.monotonic() < deadline, f"{name} is still there"
            await asyncio.sleep(0.02)

    async def ready(self, name: str = "frail") -> inference_pb2.Build:
        return await self.until(name, lambda b: b.state == READY)

    async def unavailable(self, name: str = "frail", reason: str = "") -> inference_pb2.Build:
        return await self.until(name, lambda b: b.state == UNAVAILABLE and reason in b.reason)


@asynccontextmanager
async def running_service(
    triton_grpc: str, repository: Path, monkeypatch: pytest.MonkeyPatch, **settings: str
) -> AsyncIterator[RunningService]:
    """Runs with its watcher; `settings` are further variables, without their prefix."""
    for name, value in {
        "IDENTITY_KEYS": KEYS,
        "INFERENCE_HTTP_LISTEN": "127.0.0.1:0",
        "INFERENCE_GRPC_LISTEN": "127.0.0.1:0",
        "TRITON_GRPC": triton_grpc,
        "MODEL_REPOSITORY": str(repository),
        "INFERENCE_POLL_INTERVAL_MS": "100",
        "INFERENCE_BACKOFF_MIN_MS": "50",
        "INFERENCE_BACKOFF_MAX_MS": "500",
        "BILLING_GRPC": "127.0.0.1:1",  # nobody, until a test brings a ledger
        "UNLEASH_URL": "http://127.0.0.1:9/api",
        "UNLEASH_TOKEN": "none",
        **settings,
    }.items():
        monkeypatch.setenv(f"TOLLGATE_{name}", value)
    async with AsyncExitStack() as stack:
        readiness = Readiness()
        built = await build(Settings(), stack, readiness)
        running = RunningService(built, readiness, IdentityRing(KEYS, SystemClock()), repository, triton_grpc)
        stack.push_async_callback(running.close)
        assert built.grpc is not None
        await built.grpc.start()
        stack.push_async_callback(built.grpc.stop, None)
        tasks = [asyncio.create_task(make()) for make in built.tasks.values()]
        yield running
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
