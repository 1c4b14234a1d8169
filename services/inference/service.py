"""The use cases: what is in the catalogue, in what state it is, and one step of keeping a build as it should be.

A build should be loaded when an operator says so; when nobody says anything, always, or for an on-demand build while
somebody uses it: a lease runs from each `ensure` and each sign of use, and ends when the build has been idle for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.inference import memory
from services.inference.canary import Canary, Patience
from services.inference.domain import (
    Build,
    BuildState,
    BuildStatus,
    Catalogue,
    Room,
    Snapshot,
    Wanted,
    parse_catalogue,
)
from services.inference.errors import BuildSilent, CatalogueInvalid, Contradiction, LoadFailed, TritonError
from services.inference.repository import Desired, DesiredFile
from services.inference.triton import TritonServer, parameters_in, pinned
from shared.clock import Clock
from shared.errors import NotFound, Unavailable, Unprocessable
from shared.telemetry import InferenceMetrics, get_logger

log = get_logger(__name__)

CATALOGUE_FILE = "catalogue.toml"
CONFIGURATION_FILE = "config.pbtxt"
FIRST_VERSION = "1"
ROOM_LOOK_S = 0.1
TRITON_RETRY_S = 2


class Models:
    """The catalogue of one model repository on one Triton. Loads are idempotent: any number of replicas may run."""

    def __init__(
        self,
        repository: Path,
        triton: TritonServer,
        metrics: InferenceMetrics,
        clock: Clock,
        patience: Patience,
        desired: DesiredFile,
        room: Room | None = None,
    ) -> None:
        """Reads the catalogue. Raises CatalogueInvalid."""
        self._repository = repository
        self._triton = triton
        self._canary = Canary(triton, metrics, patience)
        self._metrics = metrics
        self._clock = clock
        self._patience = patience
        self._desired = desired
        self._room = room or Room()
        self._file_version: tuple[int, int] = (0, 0)
        self._catalogue = Catalogue(())
        self._statuses: dict[str, BuildStatus] = {}
        self._lease_s: dict[str, float] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()
        self._loading = asyncio.Lock()  # room is made for one build at a time
        self._revision = int(clock.now().timestamp() * 1000)
        self.reread()

    @property
    def triton_target(self) -> str:
        return self._triton.target

    def snapshot(self) -> Snapshot:
        pins = {name: self._desired.of(name).version for name in self._statuses}
        versions = {name: version for name, version in pins.items() if version is not None}
        return Snapshot(self._catalogue, dict(self._statuses), versions, self._revision)

    def reread(self) -> bool:
        """Read the catalogue file if it has changed; whether it had. Raises CatalogueInvalid, and keeps the old one."""
        path = self._repository / CATALOGUE_FILE
        try:
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if version == self._file_version:
                return False
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CatalogueInvalid(f"cannot read {path}: {e}") from e
        self._file_version = version
        self._catalogue = parse_catalogue(text)
        builds = self._catalogue.builds
        for gone in set(self._statuses) - set(builds):
            for table in (self._statuses, self._lease_s, self._wake):
                table.pop(gone, None)
        for name in builds:
            if name not in self._statuses:
                self._statuses[name] = BuildStatus(BuildState.LOADING, "It is not loaded yet.", self._clock.now())
                self._wake[name] = asyncio.Event()
        self._metrics.build_ready.clear()  # labels of builds and aliases that are gone
        for name in builds:
            self._show(name)
        self._revision += 1
        return True

    def mark(self, build: str, state: BuildState, reason: str = "", *, drains: bool = False) -> None:
        """Record a build's state; the revision grows when that is news. `drains`: what is under way ends well."""
        before = self._statuses.get(build)
        if before is None or (before.state, before.reason) == (state, reason):
            return
        now = self._clock.now()
        is_lost = before.state is BuildState.READY and not drains
        self._statuses[build] = BuildStatus(
            state,
            reason,
            since=now if before.state is not state else before.since,
            lost_at=now if is_lost else before.lost_at,
        )
        self._revision += 1
        self._news.set()
        self._news = asyncio.Event()
        self._show(build)
        log.info("build_state", build=build, state=state.value, reason=reason)

    def is_ready(self, build: str) -> bool:
        return build in self._statuses and self._statuses[build].state is BuildState.READY

    async def pause(self, build: str, seconds: float) -> None:
        """Until the next look at a build is due, or somebody wants something of it."""
        wake = self._wake.get(build) or asyncio.Event()
        try:
            async with asyncio.timeout(seconds):
                await wake.wait()
        except TimeoutError:
            return
        wake.clear()

    async def ensure(self, build: str, wait_s: float) -> BuildStatus:
        """Want a build, and wait until it is ready or known to fail, for at most `wait_s`. Raises KeyError."""
        deadline_s = time.monotonic() + wait_s
        self._use(build)
        asked = self._statuses[build]
        if asked.state is not BuildState.READY:
            self._wake[build].set()
        while (status := self._statuses[build]).state is not BuildState.READY:
            if self._desired.of(build).wanted is Wanted.UNLOADED:
                break
            if status.state is BuildState.UNAVAILABLE and status is not asked:
                break
            news = self._news
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline_s - time.monotonic()):
                    await news.wait()
            except TimeoutError:
                break
            if build not in self._statuses:
                raise KeyError(build)
        return status

    async def want(self, build: str, wanted: Wanted) -> None:
        """An operator's word. Raises KeyError, OSError."""
        self._change(build, wanted=wanted)

    async def pin(self, build: str, version: str | None) -> None:
        """Serve that version (a folder of the build), or the highest.

        Raises KeyError, LoadFailed, TritonUnreachable.
        """
        entry = self._catalogue.builds[build]
        if version is not None:
            weights = self._repository / build / version
            if not version.isascii() or not version.isdigit() or not (weights / "model.py").is_file():
                raise LoadFailed(f"{build} has no version {version[:20]!r}.")
        self._change(build, version=version)
        if await self._triton.is_loaded(build):
            await self.reload(entry)

    async def reload(self, build: Build) -> None:
        """Load it anew from its files; streams in flight finish on what they began with.

        Raises LoadFailed, TritonUnreachable.
        """
        self._touch(build)
        await self._load(build)
        self.mark(build.name, BuildState.LOADING, "It has just been reloaded.", drains=True)
        self._wake[build.name].set()

    async def tend(self, build: Build) -> None:
        """Load the build if it should be and Triton does not have it, then make sure that it answers.

        Marks it ready on success. Raises TritonUnreachable, LoadFailed, BuildSilent, BuildRefused.
        """
        loaded = await self._triton.is_loaded(build.name, self._desired.of(build.name).version)
        if not self._should_be_loaded(build, loaded) and not await self._was_used(build):
            await self._put_away(build, loaded)
            return
        if not loaded:
            self.mark(build.name, BuildState.LOADING, "Triton is loading it.")
            await self._make_room(build)
            await self._load(build)
        if self.is_ready(build.name):
            await self._check(build)
            return
        try:
            await self._canary.prove(build)
        except Contradiction:
            await self._load(build)  # picks up a config.pbtxt that was corrected meanwhile
            raise
        self.mark(build.name, BuildState.READY)

    async def _check(self, build: Build) -> None:
        """That a ready build answers, and since when nobody has used it. One that has to make room meanwhile does not
        answer because it is unloaded: its use before that is none, and its silence no failure. Raises as the canary.
        """
        try:
            await self._canary.check(build)
            idle_s = await self._canary.idle_s(build) if build.on_demand else None
        except TritonError:
            if self._statuses[build.name].state is BuildState.UNLOADED:
                return
            raise
        if idle_s is not None and self.is_ready(build.name):
            self._use(build.name, idle_s)

    async def revive(self, build: Build) -> None:
        """Reload a loaded build that does not answer: its process died, which Triton does not notice.

        Raises as `tend`.
        """
        try:
            age_s = self._clock.now().timestamp() - self._source(build).stat().st_mtime
        except OSError as e:
            raise LoadFailed(f"Cannot look at {build.name} to reload it: {e.strerror}.") from e
        if 0 <= age_s < self._patience.reload_quiet_s:
            return  # somebody reloaded it just now; the next look decides
        self._touch(build)
        await self._load(build)
        self._metrics.recoveries.labels(build.name).inc()
        log.warning("build_reloaded", build=build.name)

    async def drop(self, build: str) -> None:
        """Unload what the catalogue no longer lists. Raises TritonUnreachable."""
        await self._triton.unload(build)
        log.info("build_unloaded", build=build)

    async def relieve(self) -> None:
        """Unload the on-demand build that was used least recently when memory is short. Raises TritonUnreachable."""
        if memory.machine_memory().room(self._room.memory_share_max) < 0:
            await self._evict_one(spare="")

    # -- what should be loaded ------------------------------------------------------------------------------------

    def _should_be_loaded(self, build: Build, loaded: bool) -> bool:
        wanted = self._desired.of(build.name).wanted
        if wanted is not Wanted.AUTO:
            return wanted is Wanted.LOADED
        if not build.on_demand:
            return True
        if loaded and build.name not in self._lease_s:
            self._use(build.name)  # loaded before this process began
        return time.monotonic() < self._lease_s.get(build.name, 0.0)

    async def _was_used(self, build: Build) -> bool:
        """Of a ready build on demand whose lease is over: whether it was used since the last look, which may be long
        ago on a busy machine. Raises as the canary."""
        if not self.is_ready(build.name) or self._desired.of(build.name).wanted is not Wanted.AUTO:
            return False
        idle_s = await self._canary.idle_s(build) or 0.0
        if not self.is_ready(build.name):
            return False  # it had to make room meanwhile
        self._use(build.name, idle_s)
        return time.monotonic() < self._lease_s[build.name]

    def _use(self, build: str, idle_s: float = 0.0) -> None:
        if build not in self._statuses:
            raise KeyError(build)
        until_s = time.monotonic() + self._patience.idle_s - idle_s
        self._lease_s[build] = max(self._lease_s.get(build, 0.0), until_s)

    def _change(self, build: str, **changes: object) -> Desired:
        if build not in self._statuses:
            raise KeyError(build)
        desired = self._desired.change(build, **changes)
        self._revision += 1
        self._wake[build].set()
        return desired

    async def _put_away(self, build: Build, loaded: bool) -> None:
        if loaded:
            await self.drop(build.name)
        by_operator = self._desired.of(build.name).wanted is Wanted.UNLOADED
        reason = "An operator has unloaded it." if by_operator else "It is loaded when somebody asks for it."
        self.mark(build.name, BuildState.UNLOADED, reason, drains=True)

    # -- room -----------------------------------------------------------------------------------------------------

    async def _make_room(self, build: Build) -> None:
        """Unload on-demand builds until this one fits. Raises LoadFailed, TritonUnreachable."""
        folder = self._repository / build.name
        parameters = parameters_in(folder / CONFIGURATION_FILE)
        on_gpu = parameters.get("n_gpu_layers", "0") != "0"
        weights = folder / self._version(build) / parameters.get("weights", "model.gguf")
        needed = 0 if on_gpu else memory.needed_bytes(weights, build)
        async with self._loading:
            while sum(status.state is BuildState.READY for status in self._statuses.values()) >= self._room.builds_max:
                if not await self._evict_one(spare=build.name):
                    raise LoadFailed(f"Loading failed: {self._room.builds_max} builds are loaded, which is the limit.")
            while (room := memory.machine_memory().room(self._room.memory_share_max)) < needed:
                if not await self._evict_one(spare=build.name):
                    raise LoadFailed(
                        f"Loading failed: it needs {memory.mib(needed)} of memory, and {memory.mib(max(0, room))} are "
                        f"left of the {self._room.memory_share_max:.0%} that may be in use."
                    )
                await self._freed(room)

    async def _evict_one(self, spare: str) -> bool:
        """Whether there was an on-demand build to unload: the least recently used."""
        builds = self._catalogue.builds
        candidates = [
            name
            for name, status in self._statuses.items()
            if status.state is BuildState.READY
            and builds[name].on_demand
            and name != spare
            and self._desired.of(name).wanted is Wanted.AUTO
        ]
        if not candidates:
            return False
        victim = min(candidates, key=lambda name: self._lease_s.get(name, 0.0))
        self._lease_s[victim] = 0.0
        await self._put_away(builds[victim], loaded=True)
        return True

    async def _freed(self, room: int) -> None:
        """Wait until an unloaded build's memory is back, streams in flight included, within reason."""
        deadline_s = time.monotonic() + self._patience.room_s
        while time.monotonic() < deadline_s:
            if memory.machine_memory().room(self._room.memory_share_max) > room:
                return
            await asyncio.sleep(ROOM_LOOK_S)

    # -- Triton ---------------------------------------------------------------------------------------------------

    def _show(self, build: str) -> None:
        self._metrics.build_ready.labels(self._catalogue.alias_of(build), build).set(self.is_ready(build))

    def _version(self, build: Build) -> str:
        """The pinned version, else the highest there is."""
        version = self._desired.of(build.name).version
        if version is not None:
            return version
        found = [path.name for path in (self._repository / build.name).glob("[0-9]*") if path.name.isdigit()]
        return max(found, key=int, default=FIRST_VERSION)

    def _source(self, build: Build) -> Path:
        return self._repository / build.name / self._version(build) / "model.py"

    def _touch(self, build: Build) -> None:
        """Triton reloads changed files only. Raises LoadFailed."""
        source = self._source(build)
        try:
            source.touch()
        except OSError as e:
            raise LoadFailed(f"Cannot touch {source.name} of {build.name} to reload it: {e.strerror}.") from e

    async def _load(self, build: Build) -> None:
        version = self._desired.of(build.name).version
        folder = self._repository / build.name
        try:
            configuration = pinned(folder / CONFIGURATION_FILE, version) if version is not None else None
            await self._triton.load(build.name, configuration)
        except LoadFailed:
            self._metrics.load_failures.labels(build.name).inc()
            raise


@contextmanager
def lifecycle_errors(build: str) -> Iterator[None]:
    """What can go wrong with one build, as callers see it. Raises NotFound, Unprocessable, Unavailable."""
    try:
        yield
    except KeyError:
        raise NotFound(f"The catalogue has no build {build[:64]!r}.", code="build_not_found") from None
    except LoadFailed as e:
        raise Unprocessable(str(e), code="load_failed") from e
    except TritonError as e:
        raise Unavailable(str(e), code="engine_unavailable", retry_after_s=TRITON_RETRY_S) from e


async def any_ready(models: Models) -> None:
    """A readiness check. Raises BuildSilent while no build can serve."""
    if not any(models.is_ready(name) for name in models.snapshot().catalogue.builds):
        raise BuildSilent("No build is ready.")
