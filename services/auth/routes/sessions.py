"""Sign in, stay signed in, sign out; and the list of where one is signed in."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, model_validator

from services.auth.errors import (
    InvalidCredentials,
    InvalidRefreshToken,
    PasswordQueueFull,
    SessionNotFound,
    SignInBlocked,
)
from services.auth.routes.dependencies import AllServices, CurrentActor, From
from services.auth.routes.fields import Body, Login, Password, RefreshToken, refusals
from services.auth.service.sessions import TokenPair
from shared.errors import InvalidRequest, Unauthenticated
from shared.web import AnyCaller

router = APIRouter(prefix="/api/v1/auth", tags=["auth"])


class LoginBody(BaseModel):
    """`username` (or the address in its place) or `email`, and the password; with both, the name counts."""

    model_config = ConfigDict(
        hide_input_in_errors=True,
        json_schema_extra={"example": {"username": "ada", "password": "correct horse battery"}},
    )

    username: Login | None = None
    email: Login | None = None
    password: Password

    @model_validator(mode="after")
    def _names_somebody(self) -> Self:
        if self.username is None and self.email is None:
            raise ValueError("send username or email.")
        return self


class RefreshBody(Body):
    refresh_token: RefreshToken


class LogoutBody(Body):
    refresh_token: RefreshToken | None = None


class TokenAnswer(BaseModel):
    """Lifetimes in seconds. Keep the refresh token secret; it works once."""

    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - the name of a scheme
    expires_in: int
    refresh_expires_in: int


class SessionAnswer(BaseModel):
    id: UUID
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    user_agent: str
    address: str | None
    current: bool


class SessionListAnswer(BaseModel):
    """All of them: how many there can be is bounded."""

    object: Literal["list"] = "list"
    data: list[SessionAnswer]
    has_more: bool = False
    next_cursor: str | None = None


@router.post(
    "/login",
    summary="Sign in",
    responses=refusals(InvalidRequest, InvalidCredentials, SignInBlocked, PasswordQueueFull),
)
async def login(body: LoginBody, services: AllServices, origin: From) -> TokenAnswer:
    """An access token for `Authorization: Bearer`, and a refresh token to get the next pair with."""
    name = body.username or body.email or ""
    return _answer(await services.sessions.login(login=name, password=body.password, origin=origin))


@router.post("/refresh", summary="Get new tokens", responses=refusals(InvalidRequest, InvalidRefreshToken))
async def refresh(body: RefreshBody, services: AllServices, _: AnyCaller) -> TokenAnswer:
    """Uses the refresh token up. One that comes a second time ends the session, since somebody copied it."""
    return _answer(await services.sessions.refresh(body.refresh_token))


@router.post("/logout", status_code=204, summary="Sign out", responses=refusals(Unauthenticated))
async def logout(services: AllServices, identity: AnyCaller, body: LogoutBody | None = None) -> None:
    """Ends the session of the access token, of `refresh_token`, or of both."""
    await services.sessions.logout(identity, body.refresh_token if body else None)


@router.get("/sessions", summary="Where am I signed in", responses=refusals(Unauthenticated))
async def list_sessions(actor: CurrentActor, services: AllServices) -> SessionListAnswer:
    """The caller's live sessions, newest first."""
    sessions = await services.sessions.list(actor)
    return SessionListAnswer(
        data=[
            SessionAnswer(
                id=s.id,
                created_at=s.created_at,
                last_used_at=s.last_used_at,
                expires_at=s.expires_at,
                user_agent=s.user_agent,
                address=s.address,
                current=s.id == actor.session_id,
            )
            for s in sessions
        ]
    )


@router.delete(
    "/sessions/{session_id}",
    status_code=204,
    summary="End a session",
    responses=refusals(Unauthenticated, SessionNotFound),
)
async def revoke_session(session_id: UUID, actor: CurrentActor, services: AllServices) -> None:
    """Its refresh token stops at once; an access token of it lives out its minutes."""
    await services.sessions.revoke(actor, session_id)


def _answer(pair: TokenPair) -> TokenAnswer:
    return TokenAnswer(
        access_token=pair.access_token,
        refresh_token=pair.refresh_token,
        expires_in=pair.expires_in_s,
        refresh_expires_in=pair.refresh_expires_in_s,
    )
