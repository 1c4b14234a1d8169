"""The catalogue over gRPC."""

from __future__ import annotations

from typing import Any

from grpc import aio

from services.inference.domain import Build, BuildState, BuildStatus
from services.inference.service import Models
from shared.rpc import inference_pb2, inference_pb2_grpc

_STATES = {
    BuildState.READY: inference_pb2.BUILD_STATE_READY,
    BuildState.LOADING: inference_pb2.BUILD_STATE_LOADING,
    BuildState.UNAVAILABLE: inference_pb2.BUILD_STATE_UNAVAILABLE,
}


class CatalogueServicer(inference_pb2_grpc.CatalogueServicer):
    """shared/rpc/inference.proto."""

    def __init__(self, models: Models) -> None:
        self._models = models

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
                    builds=[
                        _build(build, snapshot.statuses[build.name], self._models.triton_target)
                        for build in model.builds
                    ],
                )
                for model in snapshot.catalogue.models
            ],
        )


def _build(build: Build, status: BuildStatus, target: str) -> inference_pb2.Build:
    return inference_pb2.Build(
        name=build.name,
        triton_model=build.name,
        triton_target=target,
        engine=build.engine,
        quantization=build.quantization,
        context_tokens=build.context_tokens,
        slots=build.slots,
        state=_STATES[status.state],
        reason=status.reason,
        parameters=build.parameters,
    )
