"""The operator's view of the catalogue."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from services.inference.domain import Build, BuildStatus, Model
from services.inference.service import Models, Snapshot
from shared.web import Caller


class BuildView(BaseModel):
    """One build and why it is not ready."""

    name: str
    engine: str
    quantization: str
    context_tokens: int
    slots: int
    parameters: int
    stable: bool
    state: Literal["ready", "loading", "unavailable"]
    reason: str
    since: datetime


class ModelView(BaseModel):
    """A public alias with its builds."""

    alias: str
    kind: str
    description: str
    created: int
    builds: list[BuildView]


class ModelsView(BaseModel):
    """The whole catalogue."""

    revision: int
    models: list[ModelView]


def router(models: Models) -> APIRouter:
    """Routes under /api/v1/admin/inference."""
    routes = APIRouter(prefix="/api/v1/admin/inference", tags=["inference (admin)"])

    @routes.get("/models")
    async def list_models(identity: Caller) -> ModelsView:
        """Every model with its builds and their present state. For administrators and operators."""
        identity.require_role("admin", "operator")
        return _view(models.snapshot())

    return routes


def _view(snapshot: Snapshot) -> ModelsView:
    return ModelsView(
        revision=snapshot.revision,
        models=[
            ModelView(
                alias=model.alias,
                kind=model.kind,
                description=model.description,
                created=model.created,
                builds=[_build_view(model, build, snapshot.statuses[build.name]) for build in model.builds],
            )
            for model in snapshot.catalogue.models
        ],
    )


def _build_view(model: Model, build: Build, status: BuildStatus) -> BuildView:
    return BuildView(
        name=build.name,
        engine=build.engine,
        quantization=build.quantization,
        context_tokens=build.context_tokens,
        slots=build.slots,
        parameters=build.parameters,
        stable=build.name == model.stable,
        state=status.state.value,
        reason=status.reason,
        since=status.since,
    )
