"""A minimal service, run as a process by test_runtime.py."""

import asyncio
from contextlib import AsyncExitStack, suppress

from shared.clock import SystemClock
from shared.identity import IdentityRing
from shared.runtime import HttpServer, Service, ServiceSettings, main
from shared.telemetry import get_logger, new_registry
from shared.web import Readiness, create_app

log = get_logger(__name__)


class Settings(ServiceSettings):
    test_http_listen: str


async def build(settings: Settings, stack: AsyncExitStack, readiness: Readiness) -> Service:
    ring = IdentityRing(settings.identity_keys.get_secret_value(), SystemClock())
    app = create_app("test", ring=ring, registry=new_registry(), readiness=readiness)
    stack.callback(log.info, "resource_closed")
    failures = iter([RuntimeError("first"), RuntimeError("second")])

    @app.get("/slow")
    async def slow() -> dict[str, bool]:
        log.info("slow_begun")
        await asyncio.sleep(0.7)
        return {"finished": True}

    async def task() -> None:
        if error := next(failures, None):
            raise error
        log.info("task_running")
        await asyncio.Event().wait()

    async def deaf() -> None:
        """Misses a cancellation, as a wait in a library may."""
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        log.info("cancellation_missed")
        await asyncio.Event().wait()

    return Service(http=[HttpServer(app, settings.test_http_listen)], tasks={"stubborn": task, "deaf": deaf})


if __name__ == "__main__":
    main("test", Settings, build)
