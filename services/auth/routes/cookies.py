"""Browsers: tokens in cookies that no script reads, and a token against forged requests that one must read.

    tg_access    HttpOnly, Lax      what the gateway takes in place of Authorization
    tg_refresh   HttpOnly, Strict   only to /api/v1/auth
    tg_csrf      Strict             its value goes into x-csrf-token of every request that changes something

Over HTTPS the first and the last are called `__Host-…`, as is `tg_oidc` while somebody is away at a provider; all are
Secure.
"""

from __future__ import annotations

from typing import Literal

from fastapi import Request, Response
from pydantic import BaseModel

from services.auth.service.sessions import TokenPair
from shared.access_tokens import CookieNames, cookie_names

REFRESH_PATH = "/api/v1/auth"
FLOW_MAX_AGE_S = 600


class TokenAnswer(BaseModel):
    """Lifetimes in seconds. Keep the refresh token secret; it works once."""

    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - the name of a scheme
    expires_in: int
    refresh_expires_in: int


class CookieAnswer(BaseModel):
    """The tokens are in cookies. Send `csrf_token` as `x-csrf-token` with whatever changes something."""

    token_type: Literal["cookie"] = "cookie"  # noqa: S105 - the name of a scheme
    csrf_token: str
    expires_in: int
    refresh_expires_in: int


def names(request: Request) -> CookieNames:
    return cookie_names(request.app.state.public_url)


def answer(request: Request, response: Response, pair: TokenPair) -> TokenAnswer | CookieAnswer:
    """The pair as the session wants it: in the body, or in cookies."""
    if not pair.csrf_token:
        return TokenAnswer(
            access_token=pair.access_token,
            refresh_token=pair.refresh_token,
            expires_in=pair.expires_in_s,
            refresh_expires_in=pair.refresh_expires_in_s,
        )
    set_cookies(request, response, pair)
    return CookieAnswer(
        csrf_token=pair.csrf_token, expires_in=pair.expires_in_s, refresh_expires_in=pair.refresh_expires_in_s
    )


def set_cookies(request: Request, response: Response, pair: TokenPair) -> None:
    found, secure = names(request), _is_secure(request)
    longest = pair.refresh_expires_in_s
    response.set_cookie(
        found.access, pair.access_token, pair.expires_in_s, path="/", secure=secure, httponly=True, samesite="lax"
    )
    response.set_cookie(
        found.refresh, pair.refresh_token, longest, path=REFRESH_PATH, secure=secure, httponly=True, samesite="strict"
    )
    response.set_cookie(found.csrf, pair.csrf_token, longest, path="/", secure=secure, samesite="strict")


def clear_cookies(request: Request, response: Response) -> None:
    found, secure = names(request), _is_secure(request)
    for name, path in ((found.access, "/"), (found.refresh, REFRESH_PATH), (found.csrf, "/")):
        if name in request.cookies:
            response.delete_cookie(name, path=path, secure=secure)


def set_flow_cookie(request: Request, response: Response, state: str) -> None:
    """The state of a sign-in through a provider; Lax, since the provider sends the browser back here."""
    response.set_cookie(
        flow_cookie(request),
        state,
        FLOW_MAX_AGE_S,
        path="/",
        secure=_is_secure(request),
        httponly=True,
        samesite="lax",
    )


def flow_cookie(request: Request) -> str:
    """Its name; over HTTPS as of the others, so that no other host of the domain plants a sign-in of its own."""
    return "__Host-tg_oidc" if _is_secure(request) else "tg_oidc"


def clear_flow_cookie(request: Request, response: Response) -> None:
    response.delete_cookie(flow_cookie(request), path="/", secure=_is_secure(request), httponly=True, samesite="lax")


def _is_secure(request: Request) -> bool:
    public_url: str = request.app.state.public_url
    return public_url.startswith("https://")
