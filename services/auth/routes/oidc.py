"""Sign-in through OpenID providers. These addresses are for browsers, which are sent from one to the other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel

from services.auth.errors import AccountExists, OidcRefused, OidcUnavailable, ProviderNotFound
from services.auth.routes import cookies
from services.auth.routes.cookies import CookieAnswer, TokenAnswer
from services.auth.routes.dependencies import AllServices, From
from services.auth.routes.fields import refusals
from shared.errors import InvalidRequest
from shared.web import AnyCaller

router = APIRouter(prefix="/api/v1/auth/oidc", tags=["auth"])

CODE_CHARS_MAX = 4_096
REDIRECT: dict[int | str, dict[str, Any]] = {303: {"description": "To the provider, or to the page to return to."}}


class ProviderAnswer(BaseModel):
    object: Literal["oidc_provider"] = "oidc_provider"
    name: str


class ProviderListAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[ProviderAnswer]
    has_more: bool = False
    next_cursor: str | None = None


@router.get("", summary="List OpenID providers")
async def list_providers(services: AllServices, _: AnyCaller) -> ProviderListAnswer:
    """By which one may sign in here."""
    return ProviderListAnswer(data=[ProviderAnswer(name=name) for name in services.oidc.providers()])


@router.get(
    "/{provider}/start",
    summary="Sign in through a provider",
    status_code=303,
    response_class=RedirectResponse,
    responses={**REDIRECT, **refusals(InvalidRequest, ProviderNotFound, OidcUnavailable)},
)
async def start(
    provider: str,
    request: Request,
    services: AllServices,
    _: AnyCaller,
    return_to: Annotated[
        str, Query(max_length=1_024, description="A path here, to return to with cookies; without it, tokens.")
    ] = "",
) -> RedirectResponse:
    """Open in a browser. It comes back to `callback`."""
    url, state = await services.oidc.start(provider, return_to)
    response = RedirectResponse(url, 303, {"cache-control": "no-store"})
    cookies.set_flow_cookie(request, response, state)
    return response


@router.get(
    "/{provider}/callback",
    summary="Come back from a provider",
    response_model=TokenAnswer,
    responses={
        **REDIRECT,
        **refusals(InvalidRequest, OidcRefused, ProviderNotFound, AccountExists, OidcUnavailable),
    },
)
async def callback(
    provider: str,
    request: Request,
    response: Response,
    services: AllServices,
    origin: From,
    state: Annotated[str, Query(max_length=256)] = "",
    code: Annotated[str, Query(max_length=CODE_CHARS_MAX)] = "",
) -> TokenAnswer | CookieAnswer | Response:
    """Only for the browser that began, once. Cookies and a page, or tokens, as it was asked for."""
    kept = request.cookies.get(cookies.flow_cookie(request), "")
    if not code or not state:
        raise OidcRefused(detail="the provider sent no code")
    pair, return_to = await services.oidc.finish(provider, code=code, state=state, kept=kept, origin=origin)
    response.headers["cache-control"] = "no-store"
    if not return_to:
        return cookies.answer(request, response, pair)
    redirect = RedirectResponse(return_to, 303, {"cache-control": "no-store"})
    cookies.set_cookies(request, redirect, pair)
    cookies.clear_flow_cookie(request, redirect)
    return redirect
