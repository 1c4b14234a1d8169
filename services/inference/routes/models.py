"""The operator's view of the catalogue."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.inference.domain import Build, Model, Snapshot, Wanted
from services.inference.service import Models, lifecycle_errors
from shared.web import Caller

ROLES = ("admin", "operator")


class BuildView(BaseModel):
    """One build and why it is not ready."""

    name: str
    engine: str
    quantization: str
    context_tokens: int
    slots: int
    parameters: int
    stable: bool
    on_demand: bool
    version: str | None
    state: Literal["ready", "loading", "unavailable", "unloaded"]
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


class WaitBody(BaseModel):
    """How long to wait for the build to be ready."""

    wait_ms: int = Field(default=0, ge=0)


class VersionBody(BaseModel):
    """A folder of the build; null is the highest."""

    version: str | None = Field(max_length=20)


def router(models: Models, wait_max_s: float) -> APIRouter:
    """Routes under /api/v1/admin/inference."""
    routes = APIRouter(prefix="/api/v1/admin/inference", tags=["inference (admin)"])

    @routes.get("/models")
    async def list_models(identity: Caller) -> ModelsView:
        """Every model with its builds and their present state. For administrators and operators."""
        identity.require_role(*ROLES)
        return _view(models.snapshot())

    @routes.post("/builds/{build}/load")
    async def load(identity: Caller, build: str, body: WaitBody | None = None) -> BuildView:
        """Load a build and keep it loaded; waits for it as long as the body says, at most a minute."""
        identity.require_role(*ROLES)
        with lifecycle_errors(build):
            await models.want(build, Wanted.LOADED)
            await models.ensure(build, min(body.wait_ms / 1000 if body else 0, wait_max_s))
            return _one(models.snapshot(), build)

    @routes.post("/builds/{build}/unload")
    async def unload(identity: Caller, build: str) -> BuildView:
        """Unload a build and keep it so; streams in flight finish."""
        identity.require_role(*ROLES)
        with lifecycle_errors(build):
            await models.want(build, Wanted.UNLOADED)
            return _one(models.snapshot(), build)

    @routes.post("/builds/{build}/auto")
    async def auto(identity: Caller, build: str) -> BuildView:
        """Take back an earlier load or unload: the catalogue decides again."""
        identity.require_role(*ROLES)
        with lifecycle_errors(build):
            await models.want(build, Wanted.AUTO)
            return _one(models.snapshot(), build)

    @routes.post("/builds/{build}/reload")
    async def reload(identity: Caller, build: str) -> BuildView:
        """Load a build anew from its files; streams in flight finish on the old one."""
        identity.require_role(*ROLES)
        with lifecycle_errors(build):
            await models.reload(models.snapshot().catalogue.builds[build])
            return _one(models.snapshot(), build)

    @routes.put("/builds/{build}/version")
    async def pin(identity: Caller, build: str, body: VersionBody) -> BuildView:
        """Serve one version of a build's folder, or the highest again."""
        identity.require_role(*ROLES)
        with lifecycle_errors(build):
            await models.pin(build, body.version)
            return _one(models.snapshot(), build)

    return routes


def _one(snapshot: Snapshot, build: str) -> BuildView:
    model = next(m for m in snapshot.catalogue.models if any(b.name == build for b in m.builds))
    return _build_view(model, snapshot.catalogue.builds[build], snapshot)


def _view(snapshot: Snapshot) -> ModelsView:
    return ModelsView(
        revision=snapshot.revision,
        models=[
            ModelView(
                alias=model.alias,
                kind=model.kind,
                description=model.description,
                created=model.created,
                builds=[_build_view(model, build, snapshot) for build in model.builds],
            )
            for model in snapshot.catalogue.models
        ],
    )


def _build_view(model: Model, build: Build, snapshot: Snapshot) -> BuildView:
    status = snapshot.statuses[build.name]
    return BuildView(
        name=build.name,
        engine=build.engine,
        quantization=build.quantization,
        context_tokens=build.context_tokens,
        slots=build.slots,
        parameters=build.parameters,
        stable=build.name == model.stable,
        on_demand=build.on_demand,
        version=snapshot.versions.get(build.name),
        state=status.state.value,
        reason=status.reason,
        since=status.since,
    )
