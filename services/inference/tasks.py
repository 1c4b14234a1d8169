"""The watcher: every build of the catalogue is loaded, answers, and is reloaded when it does not.

One coroutine a build, so that a slow load delays nobody; one that follows the catalogue file. What it has to cope with:
- Triton restarts with nothing loaded (explicit model control): the build is not ready there, so it is loaded.
- A build's process dies: Triton goes on calling it ready and its streams hang. Only the canary notices. A load is a
  no-op until the files change, so the model file is touched first.
- A build's engine hangs: its process says so itself and ends (services/inference/backend/dispatcher.py), or the probe,
  which makes it generate, gets no answer.
- A load fails (bad weights, no memory): the reason is shown, and it is tried again with back-off.
- An operator wants a build unloaded, or nobody has used an on-demand build for long: then it is not there on purpose.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from services.inference.domain import Build, BuildState
from services.inference.errors import (
    BuildDead,
    BuildRefused,
    BuildSilent,
    CatalogueInvalid,
    TritonError,
    TritonUnreachable,
)
from services.inference.service import Models
from shared.telemetry import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, but for `canary_failures_max`: so many in a row make a build unavailable."""

    poll_s: float
    canary_failures_max: int
    backoff_min_s: float
    backoff_max_s: float


class Watcher:
    """Run it for ever; cancel it to stop. Models stay loaded."""

    def __init__(self, models: Models, pace: Pace) -> None:
        self._models = models
        self._pace = pace
        self._watched: dict[str, tuple[Build, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        try:
            while True:
                await self._follow_catalogue()
                await asyncio.sleep(self._pace.poll_s)
        finally:
            for _, task in self._watched.values():
                task.cancel()
            await asyncio.gather(*(task for _, task in self._watched.values()), return_exceptions=True)
            self._watched.clear()

    async def _follow_catalogue(self) -> None:
        try:
            self._models.reread()
        except CatalogueInvalid as e:
            log.error("catalogue_invalid", reason=str(e))
        try:
            await self._models.relieve()
        except (TritonError, OSError) as e:
            log.warning("memory_not_relieved", reason=str(e))
        listed = self._models.snapshot().catalogue.builds
        for name, (build, task) in list(self._watched.items()):
            if task.done():
                log.error("watch_failed", build=name, error=repr(task.exception()))
                self._models.mark(name, BuildState.UNAVAILABLE, "Watching it failed; the log says why.")
            elif listed.get(name) == build:
                continue
            task.cancel()
            del self._watched[name]
            if name not in listed:
                await self._drop(name)
        for name, build in listed.items():
            if name not in self._watched:
                self._watched[name] = (build, asyncio.create_task(self._watch(build), name=f"watch:{name}"))

    async def _drop(self, name: str) -> None:
        try:
            await self._models.drop(name)
        except TritonError as e:
            log.warning("unload_failed", build=name, reason=str(e))

    async def _watch(self, build: Build) -> None:
        silent = failures = 0
        while True:
            try:
                await self._models.tend(build)
            except BuildSilent as e:
                silent += 1
                dead = isinstance(e, BuildDead) or not self._models.is_ready(build.name)
                if dead or silent >= self._pace.canary_failures_max:
                    self._models.mark(build.name, BuildState.UNAVAILABLE, str(e))
                    failures = await self._revive(build, failures)
                    silent = 0
            except BuildRefused as e:
                silent = 0
                failures = await self._fail(build, str(e), failures)
            except TritonUnreachable as e:
                silent = 0
                self._models.mark(build.name, BuildState.UNAVAILABLE, str(e))
                await self._models.pause(build.name, self._pace.poll_s)
            except TritonError as e:
                silent = 0
                failures = await self._fail(build, str(e), failures)
            else:
                silent = failures = 0
                await self._models.pause(build.name, self._pace.poll_s)

    async def _revive(self, build: Build, failures: int) -> int:
        try:
            await self._models.revive(build)
        except TritonError as e:
            return await self._fail(build, str(e), failures)
        if failures:
            await self._back_off(failures)
        return failures + 1

    async def _fail(self, build: Build, reason: str, failures: int) -> int:
        self._models.mark(build.name, BuildState.UNAVAILABLE, reason)
        await self._back_off(failures)
        return failures + 1

    async def _back_off(self, failures: int) -> None:
        """Doubles up to the limit; spread, so that replicas do not act at the same moment."""
        delay_s = min(self._pace.backoff_min_s * 2 ** min(failures, 16), self._pace.backoff_max_s)
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, guards nothing
