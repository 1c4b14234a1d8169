"""Service accounts of an organisation: owners of keys that belong to no person."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from services.auth.domain.organizations import ServiceAccount
from services.auth.errors import (
    NotAllowedInOrganization,
    OrganizationNotFound,
    ServiceAccountNotFound,
    TooManyServiceAccounts,
)
from services.auth.routes.dependencies import AllServices, CurrentActor
from services.auth.routes.fields import Body, KeyName, refusals
from shared.errors import InvalidRequest, Unauthenticated

router = APIRouter(prefix="/api/v1/organizations/{org_id}/service-accounts", tags=["organizations"])


class ServiceAccountBody(Body):
    model_config = ConfigDict(json_schema_extra={"example": {"name": "nightly batch"}})

    name: KeyName


class ServiceAccountAnswer(BaseModel):
    object: Literal["service_account"] = "service_account"
    id: UUID
    name: str
    created_at: datetime


class ServiceAccountListAnswer(BaseModel):
    """All of them: how many there can be is bounded."""

    object: Literal["list"] = "list"
    data: list[ServiceAccountAnswer]
    has_more: bool = False
    next_cursor: str | None = None


@router.post(
    "",
    status_code=201,
    summary="Make a service account",
    responses=refusals(
        InvalidRequest, Unauthenticated, NotAllowedInOrganization, OrganizationNotFound, TooManyServiceAccounts
    ),
)
async def create_service_account(
    org_id: UUID, body: ServiceAccountBody, actor: CurrentActor, services: AllServices
) -> ServiceAccountAnswer:
    """It never signs in. Keys of it are made with `service_account_id`, and stay when people leave."""
    return _answer(await services.service_accounts.create(actor, org_id, body.name))


@router.get("", summary="List service accounts", responses=refusals(Unauthenticated, OrganizationNotFound))
async def list_service_accounts(org_id: UUID, actor: CurrentActor, services: AllServices) -> ServiceAccountListAnswer:
    """The first one first."""
    return ServiceAccountListAnswer(data=[_answer(a) for a in await services.service_accounts.list(actor, org_id)])


@router.delete(
    "/{service_account_id}",
    status_code=204,
    summary="Remove a service account",
    responses=refusals(Unauthenticated, NotAllowedInOrganization, OrganizationNotFound, ServiceAccountNotFound),
)
async def remove_service_account(
    org_id: UUID, service_account_id: UUID, actor: CurrentActor, services: AllServices
) -> None:
    """Its keys are revoked."""
    await services.service_accounts.remove(actor, org_id, service_account_id)


def _answer(account: ServiceAccount) -> ServiceAccountAnswer:
    return ServiceAccountAnswer.model_validate(account, from_attributes=True)
