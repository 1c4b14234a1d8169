"""Registration, and the caller's own password and profile."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from services.auth.domain import Account
from services.auth.errors import (
    EmailTaken,
    PasswordQueueFull,
    SignInBlocked,
    UsernameTaken,
    WeakPassword,
    WrongPassword,
)
from services.auth.routes.dependencies import AllServices, CurrentActor, From
from services.auth.routes.fields import Body, Email, Password, Username, refusals
from shared.errors import InvalidRequest, Unauthenticated

router = APIRouter(prefix="/api/v1/auth", tags=["auth"])


class RegisterBody(BaseModel):
    model_config = ConfigDict(
        hide_input_in_errors=True,
        json_schema_extra={
            "example": {"username": "ada", "email": "ada@example.com", "password": "correct horse battery"}
        },
    )

    username: Username
    email: Email
    password: Password


class PasswordBody(Body):
    old_password: Password
    new_password: Password


class OrganizationAnswer(BaseModel):
    id: UUID
    name: str
    role: str
    plan: str


class UserAnswer(BaseModel):
    user_id: UUID
    username: str
    email: str
    status: str
    roles: list[str]
    org_id: UUID
    plan: str
    created_at: datetime


class ProfileAnswer(UserAnswer):
    """As at registration, and what the present token or key may do."""

    scopes: list[str]
    organization: OrganizationAnswer


@router.post(
    "/register",
    status_code=201,
    summary="Make an account",
    responses=refusals(InvalidRequest, WeakPassword, UsernameTaken, EmailTaken, PasswordQueueFull),
)
async def register(body: RegisterBody, services: AllServices, origin: From) -> UserAnswer:
    """A user with a personal organisation, whose wallet starts with the installation's sign-up credits."""
    account = await services.accounts.register(
        username=body.username, email=body.email, password=body.password, origin=origin
    )
    return UserAnswer(**_user(account))


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
    return ProfileAnswer(**_user(account), scopes=list(actor.identity.scopes), organization=organization)


def _user(account: Account) -> dict[str, object]:
    return {
        "user_id": account.user_id,
        "username": account.username,
        "email": account.email,
        "status": account.status,
        "roles": list(account.roles),
        "org_id": account.org_id,
        "plan": account.plan,
        "created_at": account.created_at,
    }
