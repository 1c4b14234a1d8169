"""How a service lives: settings, start in order, serve HTTP and gRPC in one loop, drain on SIGTERM, stop in reverse.

    __main__.py   →  runtime.main("auth", Settings, build)
    app.build     →  async (settings, stack, readiness) → Service; what must be closed goes on the stack

On SIGTERM or SIGINT: /readyz turns 503, servers stop accepting and finish what is in flight within
`drain_timeout_s`, background tasks are cancelled, the stack closes in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import uvicorn
import uvloop
from grpc import aio
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.types import ASGIApp

from shared.http_protocol import GuardedHttpProtocol
from shared.telemetry import configure_logging, configure_tracing, get_logger
from shared.web import Readiness

log = get_logger(__name__)

KEEP_ALIVE_S = 75
RESTART_BACKOFF_S = (0.2, 1.0, 5.0, 15.0)
CONNECTIONS_MAX = 10_000
CANCEL_AGAIN_S = 2.0


class ServiceSettings(BaseSettings):
    """What every service reads from the environment (prefix TOLLGATE_). Frozen; secrets do not print."""

    model_config = SettingsConfigDict(env_prefix="TOLLGATE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    log_level: str = "INFO"
    identity_keys: SecretStr
    drain_timeout_s: float = 30
    otlp_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True, slots=True)
class HttpServer:
    """An ASGI application and the `host:port` it is bound to; `protocol` makes what speaks HTTP on a connection."""

    app: ASGIApp
    listen: str
    protocol: Callable[..., asyncio.Protocol] = GuardedHttpProtocol


@dataclass(slots=True)
class Service:
    """What `build` returns: what to serve, and what to keep running beside it."""

    http: list[HttpServer]
    grpc: aio.Server | None = None
    grpc_listen: str = ""
    tasks: dict[str, Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=dict)


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)
AnySettingsT = TypeVar("AnySettingsT", bound=BaseSettings)
Build = Callable[[SettingsT, AsyncExitStack, Readiness], Awaitable[Service]]


def load(settings: type[AnySettingsT]) -> AnySettingsT:
    """Read settings, or exit with one clear line per problem."""
    try:
        return settings()
    except ValidationError as e:
        for problem in e.errors():
            name = "_".join(str(p) for p in problem["loc"]).upper()
            name = name if name.startswith("OTEL") else f"TOLLGATE_{name}"
            sys.stderr.write(f"setting {name}: {problem['msg']}\n")
        raise SystemExit(2) from None


def main(name: str, settings_class: type[SettingsT], build: Build[SettingsT]) -> None:
    """Run a service until it is told to stop."""
    settings = load(settings_class)
    configure_logging(name, settings.log_level)
    provider = configure_tracing(name, settings.otlp_endpoint)
    try:
        uvloop.run(run(name, settings, build))
    finally:
        if provider is not None:
            provider.shutdown()


async def run(name: str, settings: SettingsT, build: Build[SettingsT]) -> None:
    """Build, serve, drain, stop. Returns when the process should end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    readiness = Readiness()
    async with AsyncExitStack() as stack:
        service = await build(settings, stack, readiness)
        servers = [_uvicorn(s, settings.drain_timeout_s) for s in service.http]
        if service.grpc is not None:
            _bind_grpc(service.grpc, service.grpc_listen)
            await service.grpc.start()
        serving = [asyncio.create_task(s.serve(), name=f"http:{s.config.port}") for s in servers]
        tasks = [asyncio.create_task(_keep_running(n, make), name=n) for n, make in service.tasks.items()]
        log.info("started", http=[s.listen for s in service.http], grpc=service.grpc_listen or None)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, *serving], return_when=asyncio.FIRST_COMPLETED)
        readiness.draining = True
        log.info("draining", reason="signal" if stop.is_set() else "server ended")
        failed = not stop.is_set()
        stopping.cancel()
        await _drain(service, servers, serving, tasks, settings.drain_timeout_s)
    log.info("stopped")
    if failed:
        raise SystemExit(1)


async def _drain(
    service: Service,
    servers: list[uvicorn.Server],
    serving: list[asyncio.Task[None]],
    tasks: list[asyncio.Task[None]],
    timeout_s: float,
) -> None:
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*serving, return_exceptions=True)
    if service.grpc is not None:
        await service.grpc.stop(grace=timeout_s)
    await _end(set(tasks), timeout_s)


async def _end(tasks: set[asyncio.Task[None]], timeout_s: float) -> None:
    """Cancel them until they have ended: what waits in somebody's library may miss a cancellation and wait on."""
    deadline_s = time.monotonic() + timeout_s
    while tasks and time.monotonic() < deadline_s:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
    for task in tasks:
        log.error("task_did_not_end", task=task.get_name())


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the runtime has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn(server: HttpServer, drain_timeout_s: float) -> uvicorn.Server:
    host, _, port = server.listen.rpartition(":")
    config = uvicorn.Config(
        server.app,
        host=host,
        port=int(port),
        loop="none",
        http=cast(type[asyncio.Protocol], server.protocol),  # uvicorn only calls it
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(drain_timeout_s)),
    )
    return _Server(config)


def _bind_grpc(server: aio.Server, listen: str) -> None:
    if server.add_insecure_port(listen) == 0:
        raise SystemExit(f"cannot listen on {listen} for gRPC: the address is taken or not ours")


async def _keep_running(name: str, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a background task for ever: one that fails is logged and begun again, ever later if it fails at once."""
    failures = 0
    while True:
        began_s = time.monotonic()
        try:
            await make()
        except asyncio.CancelledError:
            raise
        except Exception:
            if time.monotonic() - began_s > RESTART_BACKOFF_S[-1]:
                failures = 0
            log.exception("task_failed", task=name, failures=failures + 1)
            delay = RESTART_BACKOFF_S[min(failures, len(RESTART_BACKOFF_S) - 1)]
            failures += 1
            await asyncio.sleep(delay)
        else:
            return
