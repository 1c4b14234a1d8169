"""Browsers: tokens in cookies, and no request that somebody else's page makes them send changes anything."""

from collections.abc import AsyncIterator

import httpx
import pytest_asyncio

from shared.access_tokens import CSRF_HEADER, cookie_names
from tests.auth.front import Front, front
from tests.auth.harness import PASSWORD, User
from tests.conftest import Components

LOGIN, REFRESH = "/api/v1/auth/login", "/api/v1/auth/refresh"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def whole(owner_url: str, components: Components) -> AsyncIterator[Front]:
    async with front(owner_url, components.redis_url) as started:
        yield started


@pytest_asyncio.fixture
async def browser(whole: Front) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=whole.gateway.url, timeout=30, trust_env=False) as client:
        yield client


async def sign_in(browser: httpx.AsyncClient, user: User) -> str:
    """The token against forged requests."""
    body = {"username": user.username, "password": PASSWORD, "cookies": True}
    answer = await browser.post(LOGIN, json=body)
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert shown["token_type"] == "cookie"
    assert not {"access_token", "refresh_token"} & shown.keys()
    assert shown["csrf_token"] == browser.cookies["tg_csrf"]
    token: str = shown["csrf_token"]
    return token


async def test_what_changes_something_needs_the_token_that_only_our_pages_read(
    whole: Front, browser: httpx.AsyncClient
) -> None:
    user, other = await whole.user(), await whole.user()
    csrf = await sign_in(browser, user)
    assert (await browser.get("/api/v1/auth/me")).json()["user_id"] == user.id
    async with httpx.AsyncClient(base_url=whole.gateway.url, timeout=30, trust_env=False) as another:
        foreign = await sign_in(another, other)
    body = {"name": "made in a browser"}
    for forged in ({}, {CSRF_HEADER: ""}, {CSRF_HEADER: "x"}, {CSRF_HEADER: foreign}):
        refused = await browser.post("/api/v1/keys", json=body, headers=forged)
        assert (refused.status_code, refused.json()["code"]) == (403, "csrf_failed")
    planted = {**dict(browser.cookies), "tg_csrf": foreign}
    line = "; ".join(f"{name}={value}" for name, value in planted.items())
    refused = await whole.http.post("/api/v1/keys", json=body, headers={"cookie": line, CSRF_HEADER: foreign})
    assert refused.status_code == 403
    assert (await browser.post("/api/v1/keys", json=body, headers={CSRF_HEADER: csrf})).status_code == 201
    listed = (await browser.get("/api/v1/keys")).json()["data"]
    assert [key["name"] for key in listed] == ["made in a browser"]


async def test_the_refresh_cookie_needs_it_too_and_is_not_used_up_without(
    whole: Front, browser: httpx.AsyncClient
) -> None:
    csrf = await sign_in(browser, await whole.user())
    before = browser.cookies["tg_refresh"]
    for forged in ({}, {CSRF_HEADER: "x"}):
        refused = await browser.post(REFRESH, headers=forged)
        assert (refused.status_code, refused.json()["code"]) == (403, "csrf_failed")
    answer = await browser.post(REFRESH, headers={CSRF_HEADER: csrf})
    assert answer.status_code == 200, answer.text
    assert browser.cookies["tg_refresh"] != before
    assert (await browser.get("/api/v1/auth/me")).status_code == 200
    copied = await whole.http.post(REFRESH, json={"refresh_token": before})
    assert copied.status_code == 403
    again = await whole.http.post(REFRESH, json={"refresh_token": before}, headers={CSRF_HEADER: csrf})
    assert again.status_code == 401  # and whoever had it ended the session
    assert (await browser.get("/api/v1/auth/me")).status_code == 401


async def test_signing_out_ends_the_session_and_clears_the_cookies(whole: Front, browser: httpx.AsyncClient) -> None:
    csrf = await sign_in(browser, await whole.user())
    kept = dict(browser.cookies)
    assert (await browser.post("/api/v1/auth/logout")).status_code == 403
    assert (await browser.post("/api/v1/auth/logout", headers={CSRF_HEADER: csrf})).status_code == 204
    assert "tg_access" not in browser.cookies
    line = "; ".join(f"{name}={value}" for name, value in kept.items())
    assert (await whole.http.get("/api/v1/auth/me", headers={"cookie": line})).status_code == 401


async def test_cookies_are_out_of_reach_for_scripts_and_other_sites(whole: Front, browser: httpx.AsyncClient) -> None:
    user = await whole.user()
    body = {"username": user.username, "password": PASSWORD, "cookies": True}
    lines = (await browser.post(LOGIN, json=body)).headers.get_list("set-cookie")
    attributes = {line.partition("=")[0]: line.lower() for line in lines}
    assert set(attributes) == {"tg_access", "tg_refresh", "tg_csrf"}
    assert all("httponly" in attributes[name] for name in ("tg_access", "tg_refresh"))
    assert "samesite=lax" in attributes["tg_access"]
    assert all("samesite=strict" in attributes[name] for name in ("tg_refresh", "tg_csrf"))
    assert "path=/api/v1/auth" in attributes["tg_refresh"]
    over_https = cookie_names("https://api.example.com")
    assert over_https.access == "__Host-tg_access"
    assert over_https.csrf == "__Host-tg_csrf"


async def test_a_bearers_token_is_no_cookie_and_other_services_see_no_cookies(
    whole: Front, browser: httpx.AsyncClient
) -> None:
    user = await whole.user()
    planted = await whole.http.get("/v1/models", headers={"cookie": f"tg_access={user.access_token}"})
    assert planted.status_code == 401
    await sign_in(browser, user)
    line = f"a=b; tg_access={browser.cookies['tg_access']}"
    assert (await whole.http.get("/v1/models", headers={"cookie": line})).status_code == 200
    assert whole.others.last.header("cookie") is None
    key = await whole.key(user)
    assert (await whole.http.get("/v1/models", headers={"cookie": f"tg_access={key['key']}"})).status_code == 401
