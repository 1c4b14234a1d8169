"""The model catalogue, which inference owns: asked for in the background, the last answer kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.chat.domain.catalogue import Build, BuildState, Catalogue, Model
from services.chat.errors import catalogue_unknown
from shared.grpc import Caller
from shared.rpc import inference_pb2 as pb
from shared.rpc.inference_pb2_grpc import CatalogueStub

LIST_TIMEOUT_S = 2.0

_STATES = {
    pb.BUILD_STATE_READY: BuildState.READY,
    pb.BUILD_STATE_LOADING: BuildState.LOADING,
    pb.BUILD_STATE_UNLOADED: BuildState.UNLOADED,
}


class CatalogueClient:
    """`models` never waits: it is what the last `refresh` brought. `on_return` hears the name of each build that is
    ready after it was not.
    """

    def __init__(self, caller: Caller, on_return: Callable[[str], None]) -> None:
        self._caller = caller
        self._on_return = on_return
        self._stub = CatalogueStub(caller.channel)
        self._last: Catalogue | None = None
        self._lost_s: dict[str, float] = {}
        self._doubted = asyncio.Event()

    @property
    def last(self) -> Catalogue:
        """Raises Unavailable (catalogue_unavailable) until there was an answer."""
        if self._last is None:
            raise catalogue_unknown()
        return self._last

    @property
    def is_settled(self) -> bool:
        """Whether every build that is known is ready or not there on purpose, and some are ready."""
        builds = self._builds()
        at_rest = (BuildState.READY, BuildState.UNLOADED)
        return any(b.is_ready for b in builds) and all(b.state in at_rest for b in builds)

    def _builds(self) -> list[Build]:
        return [b for m in self._last.models.values() for b in m.builds.values()] if self._last is not None else []

    async def refresh(self) -> None:
        """Ask inference. Raises TollgateError and keeps what was there."""
        reply = await self._caller.call(self._stub.List, pb.ListRequest(), timeout_s=LIST_TIMEOUT_S)
        before = {b.name: b for b in self._builds()}
        self._last = Catalogue({m.alias: _model(m) for m in reply.models}, reply.revision)
        now_s = time.monotonic()
        builds = self._builds()
        self._lost_s = {b.name: self._lost_s.get(b.name, float("-inf")) for b in builds}
        for build in builds:
            known = before.get(build.name)
            is_replaced = known is not None and build.lost_at_ms > known.lost_at_ms
            if is_replaced or build.state is BuildState.UNAVAILABLE:
                self._lost_s[build.name] = now_s
            if build.is_ready and known is not None and (is_replaced or not known.is_ready):
                self._on_return(build.name)

    async def load(self, build: str, wait_s: float) -> None:
        """Have an on-demand build loaded; returns when it is, or at the latest after `wait_s`. Raises TollgateError."""
        request = pb.EnsureRequest(build=build, wait_ms=int(wait_s * 1000))
        await self._caller.call(self._stub.Ensure, request, timeout_s=wait_s + LIST_TIMEOUT_S)
        await self.refresh()

    def was_lost(self, build: str, since_s: float) -> bool:
        """Whether a refresh after `since_s` (time.monotonic) brought that a build had failed, or is gone.

        Also one that was replaced between two refreshes; not one that is reloaded or unloaded: that ends its streams.
        Who asks has heard nothing of it for long: the next refresh comes earlier.
        """
        self._doubted.set()
        return self._lost_s.get(build, float("inf")) > since_s

    async def doubted(self) -> None:
        """Returns when somebody has asked since whether a build was lost."""
        self._doubted.clear()
        await self._doubted.wait()


def _model(message: pb.Model) -> Model:
    return Model(
        alias=message.alias,
        kind=message.kind,
        description=message.description,
        created=message.created,
        stable_build=message.stable_build,
        builds={b.name: _build(b) for b in message.builds},
    )


def _build(message: pb.Build) -> Build:
    return Build(
        name=message.name,
        triton_model=message.triton_model or message.name,
        triton_version=message.triton_version,
        triton_target=message.triton_target,
        engine=message.engine,
        quantization=message.quantization,
        context_tokens=message.context_tokens,
        state=_STATES.get(message.state, BuildState.UNAVAILABLE),
        parameters=message.parameters,
        on_demand=message.on_demand,
        lost_at_ms=message.lost_at_ms,
    )
