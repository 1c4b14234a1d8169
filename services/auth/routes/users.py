"""The caller's own password and profile."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel

from services.auth.errors import (
    PasswordQueueFull,
    SignInBlocked,
    WeakPassword,
    WrongPassword,
)
from services.auth.routes.dependencies import AllServices, CurrentActor
from services.auth.routes.fields import Body, Password, refusals
from services.auth.routes.registration import UserAnswer, user_answer
from shared.errors import InvalidRequest, Unauthenticated

router = APIRouter(prefix="/api/v1/auth", tags=["auth"])


class PasswordBody(Body):
    old_password: Password
    new_password: Password


class OrganizationAnswer(BaseModel):
    id: UUID
    name: str
    role: str
    plan: str


class ProfileAnswer(UserAnswer):
    """As at registration, and what the present token or key may do."""

    scopes: list[str]
    organization: OrganizationAnswer


@router.post(
    "/password",
    status_code=204,
    summary="Change the password",
    responses=refusals(InvalidRequest, WeakPassword, Unauthenticated, WrongPassword, SignInBlocked, PasswordQueueFull),
)
async def change_password(body: PasswordBody, actor: CurrentActor, services: AllServices) -> None:
    """Ends the caller's other sessions, not this one. API keys stay as they are."""
    await services.accounts.change_password(actor, old=body.old_password, new=body.new_password)


@router.get("/me", summary="Who am I", responses=refusals(Unauthenticated))
async def me(actor: CurrentActor, services: AllServices) -> ProfileAnswer:
    """The account behind the access token or API key."""
    account = await services.accounts.profile(actor)
    organization = OrganizationAnswer(
        id=account.org_id, name=account.org_name, role=account.org_role, plan=account.plan
    )
    return ProfileAnswer(
        **user_answer(account).model_dump(), scopes=list(actor.identity.scopes), organization=organization
    )
