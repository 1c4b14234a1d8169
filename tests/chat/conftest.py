"""The chat service as it is built for production, on a real port, between doubles (see doubles.py).

`chat`   its time limits are far beyond what any test takes, so that what a test sees is never a slow machine's doing.
`hasty`  the same between the same doubles, whose limits are short: for engines that fall silent, clients that do not
         read, a ledger that is away.
"""

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import httpx
import hypothesis
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
# No deadline for an example: a slow machine is no finding.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

PATIENCE_S = 60.0
STREAMS = "tollgate_chat_streams"
PATIENT = {
    "chat_first_chunk_timeout_ms": 120_000,
    "chat_count_timeout_ms": 120_000,
    "chat_chunk_timeout_ms": 120_000,
    "chat_send_timeout_ms": 120_000,
    "chat_settle_wait_ms": 60_000,
}
HASTY = {
    "chat_first_chunk_timeout_ms": 3_000,
    "chat_count_timeout_ms": 1_500,
    "chat_chunk_timeout_ms": 2_000,
    "chat_send_timeout_ms": 500,
    "chat_settle_wait_ms": 300,
}


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

    async def is_idle(self) -> bool:
        """Whether no generation is counted as running."""
        return await self.metric(STREAMS) == 0


LONG = [{"role": "user", "content": "Count to a hundred, slowly, and do not leave out a single number."}]
"""A prompt whose bytes do not fit the double's context with an answer, so that the engine must count it."""


def asking(**body: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "Count."}], **body}


async def told(event: asyncio.Event) -> None:
    """Wait for an event. Raises TimeoutError after PATIENCE_S."""
    await asyncio.wait_for(event.wait(), PATIENCE_S)


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


@dataclass(frozen=True)
class Surroundings:
    """The doubles, and the settings that lead to them."""

    engine: Engine
    ledger: Ledger
    catalogue: CatalogueDouble
    ring: IdentityRing
    settings: dict[str, Any]


@pytest.fixture(scope="session")
async def surroundings(components: Components) -> AsyncIterator[Surroundings]:
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
    settings = {
        "identity_keys": KEYS,
        "chat_http_listen": "127.0.0.1:0",
        "billing_grpc": await listen(billing),
        "inference_grpc": await listen(inference),
        "chat_database_url": database_url,
        "redis_url": components.redis_url,
        "chat_redis_timeout_ms": 60_000,  # Redis is never away here, only late
        "unleash_url": "http://127.0.0.1:9/api",  # nobody: Unleash is down from the start
        "unleash_token": "none",
        "chat_messages_max": 5,
        "chat_prompt_chars_max": 2_000,
        "chat_max_tokens_default": 40,
        "chat_generations_max": 3,
        "chat_choices_max": 3,
        "chat_left_running_max": 2,
        "chat_priority_plans": ["gold"],
        "chat_breaker_failures_max": 10_000,  # the double fails on purpose
        "catalogue_refresh_ms": 100,
    }
    yield Surroundings(engine, ledger, catalogue, ring, settings)
    for server in (triton, billing, inference):
        await server.stop(None)


@contextlib.asynccontextmanager
async def run_chat(around: Surroundings, limits: dict[str, int]) -> AsyncIterator[Chat]:
    """A chat service of these limits over the doubles, which are well again, whatever the test before asked of them."""
    around.engine.reset()
    around.ledger.reset()
    settings = ChatSettings.model_validate({**around.settings, **limits})
    async with AsyncExitStack() as stack:
        service = await build(settings, stack, Readiness())
        tasks = [asyncio.create_task(make()) for make in service.tasks.values()]
        app = service.http[0].app
        url = await stack.enter_async_context(serving(app))
        chat = Chat(url, app, around.engine, around.ledger, around.catalogue, around.ring)
        async with chat.client() as client:

            async def has_models() -> bool:
                return (await client.get("/v1/models")).status_code == 200

            await until(has_models)
        assert (await chat.complete()).status_code == 200  # which measures the template: see domain/prompt.py
        yield chat
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(scope="session")
async def running(surroundings: Surroundings) -> AsyncIterator[Chat]:
    async with run_chat(surroundings, PATIENT) as chat:
        yield chat


@pytest.fixture(scope="session")
async def running_hasty(surroundings: Surroundings) -> AsyncIterator[Chat]:
    async with run_chat(surroundings, HASTY) as chat:
        yield chat


@contextlib.asynccontextmanager
async def _well_behaved(running: Chat) -> AsyncIterator[Chat]:
    """Before the test; after it, nothing of it is under way that might arrive in the next."""
    running.engine.reset()
    running.ledger.reset()
    yield running
    await until(running.ledger.is_quiet)
    await until(running.is_idle)
    if running.catalogue.lost:
        running.catalogue.lost.clear()
        async with running.client() as client:

            async def all_ready() -> bool:
                builds = (await client.get("/v1/models/small")).json()["builds"]
                return all(b["state"] == "ready" for b in builds)

            await until(all_ready)


@pytest.fixture
async def chat(running: Chat) -> AsyncIterator[Chat]:
    """The service, with the doubles well-behaved again."""
    async with _well_behaved(running) as chat:
        yield chat


@pytest.fixture
async def hasty(running_hasty: Chat) -> AsyncIterator[Chat]:
    """The service with short time limits, and the doubles well-behaved again."""
    async with _well_behaved(running_hasty) as chat:
        yield chat
