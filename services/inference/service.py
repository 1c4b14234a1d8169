"""The use cases: what is in the catalogue, in what state it is, and one step of keeping a build alive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.inference.domain import Build, BuildState, BuildStatus, Catalogue, parse_catalogue
from services.inference.errors import BuildRefused, BuildSilent, CatalogueInvalid, LoadFailed
from services.inference.triton import TritonServer
from shared.clock import Clock
from shared.telemetry import InferenceMetrics, get_logger

log = get_logger(__name__)

CATALOGUE_FILE = "catalogue.toml"
VERSION = "1"
QUESTION = {"messages": [{"role": "user", "content": "ping"}]}
FIRST_TOKEN = {**QUESTION, "max_tokens": 1}
COUNT = {**QUESTION, "op": "count"}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the catalogue looks like at one moment. `revision` grows with every change, restarts included."""

    catalogue: Catalogue
    statuses: dict[str, BuildStatus]
    revision: int


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds."""

    canary_s: float
    first_token_s: float
    reload_quiet_s: float
    """Another replica's reload is given this long before this one reloads too."""


class Models:
    """The catalogue of one model repository on one Triton. Loads are idempotent: any number of replicas may run."""

    def __init__(
        self, repository: Path, triton: TritonServer, metrics: InferenceMetrics, clock: Clock, patience: Patience
    ) -> None:
        """Reads the catalogue. Raises CatalogueInvalid."""
        self._repository = repository
        self._triton = triton
        self._metrics = metrics
        self._clock = clock
        self._patience = patience
        self._file_version: tuple[int, int] = (0, 0)
        self._catalogue = Catalogue(())
        self._statuses: dict[str, BuildStatus] = {}
        self._revision = int(clock.now().timestamp() * 1000)
        self.reread()

    @property
    def triton_target(self) -> str:
        return self._triton.target

    def snapshot(self) -> Snapshot:
        return Snapshot(self._catalogue, dict(self._statuses), self._revision)

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
            del self._statuses[gone]
        for name in builds:
            if name not in self._statuses:
                self._statuses[name] = BuildStatus(BuildState.LOADING, "It is not loaded yet.", self._clock.now())
        self._metrics.build_ready.clear()  # labels of builds and aliases that are gone
        for name in builds:
            self._show(name)
        self._revision += 1
        return True

    def mark(self, build: str, state: BuildState, reason: str = "") -> None:
        """Record a build's state; the revision grows when that is news."""
        before = self._statuses.get(build)
        if before is None or (before.state, before.reason) == (state, reason):
            return
        since = self._clock.now() if before.state is not state else before.since
        self._statuses[build] = BuildStatus(state, reason, since)
        self._revision += 1
        self._show(build)
        log.info("build_state", build=build, state=state.value, reason=reason)

    def is_ready(self, build: str) -> bool:
        return build in self._statuses and self._statuses[build].state is BuildState.READY

    async def tend(self, build: Build) -> None:
        """Load the build if Triton does not have it, then make sure that it answers.

        Marks it ready on success. Raises TritonUnreachable, LoadFailed, BuildSilent, BuildRefused.
        """
        if not await self._triton.is_loaded(build.name):
            self.mark(build.name, BuildState.LOADING, "Triton is loading it.")
            await self._load(build)
        if self.is_ready(build.name):
            await self._count(build)
            return
        await self._prove(build)
        self.mark(build.name, BuildState.READY)

    async def revive(self, build: Build) -> None:
        """Reload a loaded build that does not answer: its process died, which Triton does not notice.

        Raises as `tend`.
        """
        source = self._repository / build.name / VERSION / "model.py"
        try:
            age_s = self._clock.now().timestamp() - source.stat().st_mtime
            if 0 <= age_s < self._patience.reload_quiet_s:
                return  # somebody reloaded it just now; the next look decides
            source.touch()  # Triton reloads changed files only
        except OSError as e:
            raise LoadFailed(f"Cannot touch {source.name} of {build.name} to reload it: {e.strerror}.") from e
        await self._load(build)
        self._metrics.recoveries.labels(build.name).inc()
        log.warning("build_reloaded", build=build.name)

    async def drop(self, build: str) -> None:
        """Unload what the catalogue no longer lists. Raises TritonUnreachable."""
        await self._triton.unload(build)
        log.info("build_unloaded", build=build)

    def _show(self, build: str) -> None:
        self._metrics.build_ready.labels(self._catalogue.alias_of(build), build).set(self.is_ready(build))

    async def _load(self, build: Build) -> None:
        try:
            await self._triton.load(build.name)
        except LoadFailed:
            self._metrics.load_failures.labels(build.name).inc()
            raise

    async def _count(self, build: Build) -> None:
        """The canary. It passes through the build's process but takes no slot, so a busy build answers too."""
        with self._metrics.canary_s.labels(build.name).time():
            try:
                answers = await self._triton.ask(build.name, COUNT, timeout_s=self._patience.canary_s)
            except BuildRefused as e:
                if e.code == "queue_full":
                    return  # alive, and busier than it should be
                raise
        if answers[0].get("context_tokens") != build.context_tokens:
            raise BuildRefused("engine_error", "Its context is not what the catalogue says.")

    async def _prove(self, build: Build) -> None:
        """Before it is called ready: the configuration is the catalogue's, and a first token comes."""
        parameters = await self._triton.parameters(build.name)
        for name, listed in (("context_tokens", build.context_tokens), ("slots", build.slots)):
            if parameters.get(name) != str(listed):
                await self._load(build)  # picks up a config.pbtxt that was corrected meanwhile
                raise BuildRefused(
                    "engine_error", f"{name} is {listed} in the catalogue and {parameters.get(name)} in config.pbtxt."
                )
        await self._count(build)
        try:
            await self._triton.ask(build.name, FIRST_TOKEN, timeout_s=self._patience.first_token_s)
        except BuildRefused as e:
            if e.code not in ("queue_full", "deadline_exceeded"):  # these come from load by others: alive
                raise


async def any_ready(models: Models) -> None:
    """A readiness check. Raises BuildSilent while no build can serve."""
    if not any(models.is_ready(name) for name in models.snapshot().catalogue.builds):
        raise BuildSilent("No build is ready.")
