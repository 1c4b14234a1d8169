"""Sign in, stay signed in, sign out; and the list of where one is signed in."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.auth.errors import (
    CsrfFailed,
    InvalidCredentials,
    InvalidRefreshToken,
    OrganizationNotFound,
    PasswordQueueFull,
    SessionNotFound,
    SignInBlocked,
)
from services.auth.routes import cookies
from services.auth.routes.cookies import CookieAnswer, TokenAnswer
from services.auth.routes.dependencies import AllServices, CurrentActor, From
from services.auth.routes.fields import TOKEN_CHARS_MAX, Body, Login, Password, RefreshToken, refusals
from shared.access_tokens import CSRF_HEADER
from shared.errors import InvalidRequest, Unauthenticated
from shared.web import AnyCaller

router = APIRouter(prefix="/api/v1/auth", tags=["auth"])


CsrfToken = Annotated[
    str, Header(alias=CSRF_HEADER, max_length=128, description="For browsers: the value of the csrf cookie.")
]


class LoginBody(BaseModel):
    """`username` (or the address in its place) or `email`, and the password; with both, the name counts."""

    model_config = ConfigDict(
        hide_input_in_errors=True,
        json_schema_extra={"example": {"username": "ada", "password": "correct horse battery"}},
    )

    username: Login | None = None
    email: Login | None = None
    password: Password
    cookies: bool = Field(False, description="For browsers: the tokens in cookies, and a CSRF token in the answer.")

    @model_validator(mode="after")
    def _names_somebody(self) -> Self:
        if self.username is None and self.email is None:
            raise ValueError("send username or email.")
        return self


class RefreshBody(Body):
    """`refresh_token` unless it is in a cookie. `organization_id`: one of the caller's, for which these tokens and all
    later ones of the session are.
    """

    refresh_token: RefreshToken | None = None
    organization_id: UUID | None = None


class LogoutBody(Body):
    refresh_token: RefreshToken | None = None


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
async def login(
    body: LoginBody, request: Request, response: Response, services: AllServices, origin: From
) -> TokenAnswer | CookieAnswer:
    """An access token for `Authorization: Bearer`, and a refresh token to get the next pair with."""
    name = body.username or body.email or ""
    pair = await services.sessions.login(login=name, password=body.password, origin=origin, browser=body.cookies)
    return cookies.answer(request, response, pair)


@router.post(
    "/refresh",
    summary="Get new tokens",
    responses=refusals(InvalidRequest, InvalidRefreshToken, CsrfFailed, OrganizationNotFound),
)
async def refresh(
    request: Request,
    response: Response,
    services: AllServices,
    _: AnyCaller,
    body: RefreshBody | None = None,
    csrf_token: CsrfToken = "",
) -> TokenAnswer | CookieAnswer:
    """Uses the refresh token up, of the body or the cookie. One that comes a second time ends the session, since
    somebody copied it. With `organization_id` the session goes on in that organisation: tokens for the one before are
    over.
    """
    refresh_token = (body and body.refresh_token) or request.cookies.get(cookies.names(request).refresh, "")
    if len(refresh_token) > TOKEN_CHARS_MAX:
        raise InvalidRefreshToken()
    org_id = body.organization_id if body else None
    return cookies.answer(request, response, await services.sessions.refresh(refresh_token, csrf_token, org_id))


@router.post("/logout", status_code=204, summary="Sign out", responses=refusals(Unauthenticated))
async def logout(
    request: Request, response: Response, services: AllServices, identity: AnyCaller, body: LogoutBody | None = None
) -> None:
    """Ends the session of the access token, of `refresh_token`, or of both; a browser's cookies go."""
    await services.sessions.logout(identity, body.refresh_token if body else None)
    cookies.clear_cookies(request, response)


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
    """Its tokens stop at once."""
    await services.sessions.revoke(actor, session_id)
