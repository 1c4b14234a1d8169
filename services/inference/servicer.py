"""The catalogue over gRPC."""

from __future__ import annotations

from typing import Any

from grpc import aio

from services.inference.domain import Build, BuildState, Snapshot, Wanted
from services.inference.service import Models, lifecycle_errors
from shared.errors import InvalidRequest
from shared.rpc import inference_pb2, inference_pb2_grpc

_STATES = {
    BuildState.READY: inference_pb2.BUILD_STATE_READY,
    BuildState.LOADING: inference_pb2.BUILD_STATE_LOADING,
    BuildState.UNAVAILABLE: inference_pb2.BUILD_STATE_UNAVAILABLE,
    BuildState.UNLOADED: inference_pb2.BUILD_STATE_UNLOADED,
}
_WANTED = {
    inference_pb2.ACTION_LOAD: Wanted.LOADED,
    inference_pb2.ACTION_UNLOAD: Wanted.UNLOADED,
    inference_pb2.ACTION_AUTO: Wanted.AUTO,
}


class CatalogueServicer(inference_pb2_grpc.CatalogueServicer):
    """shared/rpc/inference.proto."""

    def __init__(self, models: Models, wait_max_s: float) -> None:
        """`wait_max_s` bounds what an Ensure may ask for."""
        self._models = models
        self._wait_max_s = wait_max_s

    async def List(
        self, request: inference_pb2.ListRequest, context: aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListReply:
        snapshot = self._models.snapshot()
        return inference_pb2.ListReply(
            revision=snapshot.revision,
            models=[
                inference_pb2.Model(
                    alias=model.alias,
                    description=model.description,
                    created=model.created,
                    stable_build=model.stable,
                    kind=model.kind,
                    builds=[self._build(snapshot, build) for build in model.builds],
                )
                for model in snapshot.catalogue.models
            ],
        )

    async def Ensure(
        self, request: inference_pb2.EnsureRequest, context: aio.ServicerContext[Any, Any]
    ) -> inference_pb2.Build:
        with lifecycle_errors(request.build):
            await self._models.ensure(request.build, min(request.wait_ms / 1000, self._wait_max_s))
            return self._one(request.build)

    async def Control(
        self, request: inference_pb2.ControlRequest, context: aio.ServicerContext[Any, Any]
    ) -> inference_pb2.Build:
        with lifecycle_errors(request.build):
            if request.action in _WANTED:
                await self._models.want(request.build, _WANTED[request.action])
            elif request.action == inference_pb2.ACTION_PIN:
                await self._models.pin(request.build, request.version or None)
            elif request.action == inference_pb2.ACTION_RELOAD:
                await self._models.reload(self._models.snapshot().catalogue.builds[request.build])
            else:
                raise InvalidRequest("The action is not known.", param="action")
            return self._one(request.build)

    def _one(self, name: str) -> inference_pb2.Build:
        snapshot = self._models.snapshot()
        return self._build(snapshot, snapshot.catalogue.builds[name])

    def _build(self, snapshot: Snapshot, build: Build) -> inference_pb2.Build:
        status = snapshot.statuses[build.name]
        return inference_pb2.Build(
            name=build.name,
            triton_model=build.name,
            triton_version=snapshot.versions.get(build.name, ""),
            triton_target=self._models.triton_target,
            engine=build.engine,
            quantization=build.quantization,
            context_tokens=build.context_tokens,
            slots=build.slots,
            state=_STATES[status.state],
            reason=status.reason,
            parameters=build.parameters,
            on_demand=build.on_demand,
            lost_at_ms=int(status.lost_at.timestamp() * 1000) if status.lost_at is not None else 0,
        )
