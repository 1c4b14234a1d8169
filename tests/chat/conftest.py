"""The chat service as it is built for production, on a real port, between doubles (see doubles.py)."""

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import uvicorn
from grpc import aio
from prometheus_client import CollectorRegistry
from tritonclient.grpc import service_pb2_grpc

from services.chat.app import build
from services.chat.cli import migrate_urls
from services.chat.settings import ChatSettings
from shared.clock import SystemClock
from shared.grpc import create_server
from shared.identity import HEADER, Identity, IdentityRing
from shared.rpc import billing_pb2_grpc, inference_pb2_grpc
from shared.telemetry import GrpcMetrics
from shared.web import Readiness
from tests.chat.doubles import CatalogueDouble, Engine, Ledger, listen
from tests.conftest import Components, role_url

KEYS = f"k1:{base64.b64encode(b'c' * 32).decode()}"
CALLER = Identity(kind="key", user_id="user", org_id="org", key_id="key", scopes=("chat", "models"))
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Chat:
    """The running service and what stands around it."""

    url: str
    app: Any
    engine: Engine
    ledger: Ledger
    catalogue: CatalogueDouble
    ring: IdentityRing

    def client(self, **identity: Any) -> httpx.AsyncClient:
        """An HTTP client that carries what the gateway would sign."""
        token = self.ring.sign(replace(CALLER, **identity))
        return httpx.AsyncClient(base_url=self.url, headers={HEADER: token}, timeout=PATIENCE_S)

    async def complete(self, **body: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json=asking(**body))

    async def metric(self, line: str) -> float:
        """A sample by its name with labels, 0 when it is not there."""
        async with self.client() as client:
            for found in (await client.get("/metrics")).text.splitlines():
                if found.startswith(line + " "):
                    return float(found.rpartition(" ")[2])
        return 0.0


LONG = [{"role": "user", "content": "Count to a hundred, slowly, and do not leave out a single number."}]
"""A prompt whose bytes do not fit the double's context with an answer, so that the engine must count it."""


def asking(**body: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "Count."}], **body}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition. Raises TimeoutError after PATIENCE_S."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.fixture(scope="session")
async def running(components: Components) -> AsyncIterator[Chat]:
    ring = IdentityRing(KEYS, SystemClock())
    engine, ledger = Engine(), Ledger()
    triton = aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(engine, triton)
    catalogue = CatalogueDouble(await listen(triton))
    billing = create_server(ring, GrpcMetrics(CollectorRegistry(), "billing"))
    billing_pb2_grpc.add_LedgerServicer_to_server(ledger, billing)
    inference = create_server(ring, GrpcMetrics(CollectorRegistry(), "inference"))
    inference_pb2_grpc.add_CatalogueServicer_to_server(catalogue, inference)
    owner_url = components.create_database("chat")
    database_url = role_url(owner_url, "tollgate_chat")
    await asyncio.to_thread(migrate_urls, owner_url, database_url)
    settings = ChatSettings.model_validate(
        {
            "identity_keys": KEYS,
            "chat_http_listen": "127.0.0.1:0",
            "billing_grpc": await listen(billing),
            "inference_grpc": await listen(inference),
            "chat_database_url": database_url,
            "redis_url": components.redis_url,
            "unleash_url": "http://127.0.0.1:9/api",  # nobody: Unleash is down from the start
            "unleash_token": "none",
            "chat_messages_max": 5,
            "chat_prompt_chars_max": 2_000,
            "chat_max_tokens_default": 40,
            "chat_first_chunk_timeout_ms": 4_000,
            "chat_count_timeout_ms": 1_500,
            "chat_chunk_timeout_ms": 1_500,
            "chat_send_timeout_ms": 500,
            "chat_settle_wait_ms": 300,
            "chat_generations_max": 3,
            "chat_choices_max": 3,
            "chat_priority_plans": ["gold"],
            "chat_breaker_failures_max": 10_000,  # the double fails on purpose
            "catalogue_refresh_ms": 100,
        }
    )
    async with AsyncExitStack() as stack:
        service = await build(settings, stack, Readiness())
        tasks = [asyncio.create_task(make()) for make in service.tasks.values()]
        app = service.http[0].app
        chat = Chat(await stack.enter_async_context(serving(app)), app, engine, ledger, catalogue, ring)
        async with chat.client() as client:

            async def has_models() -> bool:
                return (await client.get("/v1/models")).status_code == 200

            await until(has_models)
        assert (await chat.complete()).status_code == 200  # which measures the template: see domain/prompt.py
        yield chat
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for server in (triton, billing, inference):
        await server.stop(None)


@pytest.fixture
async def chat(running: Chat) -> AsyncIterator[Chat]:
    """The service, with the doubles well-behaved again."""
    running.engine.reset()
    running.ledger.reset()
    yield running
    await until(running.ledger.is_quiet)  # nothing of this test may arrive in the next
    if running.catalogue.lost:
        running.catalogue.lost.clear()
        async with running.client() as client:

            async def all_ready() -> bool:
                builds = (await client.get("/v1/models/small")).json()["builds"]
                return all(b["state"] == "ready" for b in builds)

            await until(all_ready)
