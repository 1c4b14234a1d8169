"""Accounts by e-mail: registration, proof of an address, a forgotten password."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict

from services.auth.domain import Account
from services.auth.errors import (
    EmailBusy,
    EmailNotConfigured,
    EmailTaken,
    InvalidEmailToken,
    PasswordQueueFull,
    RegistrationClosed,
    UsernameTaken,
    WeakPassword,
    WrongPassword,
)
from services.auth.routes.dependencies import AllServices, CurrentActor, From
from services.auth.routes.fields import Body, Email, Password, RefreshToken, Username, refusals
from shared.errors import InvalidRequest, Unauthenticated
from shared.web import AnyCaller

router = APIRouter(prefix="/api/v1/auth", tags=["auth"])

EmailTokenField = RefreshToken  # the same alphabet and bound


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


class EmailBody(Body):
    email: Email


class VerifyBody(Body):
    """The token from the message, and the account's password: the one chosen at registration."""

    token: EmailTokenField
    password: Password


class ResetBody(Body):
    token: EmailTokenField
    new_password: Password


class UserAnswer(BaseModel):
    user_id: UUID
    username: str
    email: str
    status: str
    roles: list[str]
    org_id: UUID
    plan: str
    created_at: datetime


class MessageSentAnswer(BaseModel):
    """If the address is one that gets a message, it is on its way. The same for every address."""

    status: Literal["message_sent"] = "message_sent"


SENT: dict[int | str, dict[str, Any]] = {
    202: {"model": MessageSentAnswer, "description": "The address is to be proven first: a message was sent."}
}


@router.post(
    "/register",
    status_code=201,
    response_model=UserAnswer,
    summary="Make an account",
    responses={
        **SENT,
        **refusals(
            InvalidRequest,
            WeakPassword,
            RegistrationClosed,
            UsernameTaken,
            EmailTaken,
            PasswordQueueFull,
            EmailBusy,
        ),
    },
)
async def register(body: RegisterBody, services: AllServices, origin: From) -> UserAnswer | Response:
    """A user with a personal organisation, whose wallet starts with the installation's sign-up credits."""
    account = await services.registration.register(
        username=body.username, email=body.email, password=body.password, origin=origin
    )
    if account is None:
        return Response(MessageSentAnswer().model_dump_json(), 202, media_type="application/json")
    return user_answer(account)


@router.post(
    "/verify-email",
    status_code=201,
    response_model=UserAnswer,
    summary="Prove an e-mail address",
    responses={
        204: {"description": "The address of an account that was there is proven."},
        **refusals(InvalidRequest, InvalidEmailToken, WrongPassword, UsernameTaken, PasswordQueueFull),
    },
)
async def verify_email(body: VerifyBody, services: AllServices, origin: From) -> UserAnswer | Response:
    """With the token from the message and the password, so that nobody proves an address for somebody else's account.
    Where registration waits for it, this makes the account.
    """
    account = await services.registration.confirm(body.token, body.password, origin)
    return Response(status_code=204) if account is None else user_answer(account)


@router.post(
    "/verify-email/send",
    status_code=202,
    summary="Send a token to my address",
    responses=refusals(Unauthenticated, EmailNotConfigured, EmailBusy),
)
async def send_verification(actor: CurrentActor, services: AllServices) -> MessageSentAnswer:
    """To the caller's own address."""
    await services.registration.ask_verification(actor)
    return MessageSentAnswer()


@router.post(
    "/password/forgot",
    status_code=202,
    summary="Send a token for a new password",
    responses=refusals(InvalidRequest, EmailNotConfigured, EmailBusy),
)
async def forgot_password(body: EmailBody, services: AllServices, _: AnyCaller) -> MessageSentAnswer:
    """The answer is the same, after the same work, whether the address has an account or not."""
    await services.registration.forgot_password(body.email)
    return MessageSentAnswer()


@router.post(
    "/password/reset",
    status_code=204,
    summary="Set a new password by a token",
    responses=refusals(InvalidRequest, WeakPassword, InvalidEmailToken, PasswordQueueFull),
)
async def reset_password(body: ResetBody, services: AllServices, origin: From) -> None:
    """Ends all sessions. API keys stay, unless nobody had proven the address before: then somebody else may have made
    them.
    """
    await services.registration.reset_password(body.token, new=body.new_password, origin=origin)


def user_answer(account: Account) -> UserAnswer:
    return UserAnswer(
        user_id=account.user_id,
        username=account.username,
        email=account.email,
        status=account.status,
        roles=list(account.roles),
        org_id=account.org_id,
        plan=account.plan,
        created_at=account.created_at,
    )
