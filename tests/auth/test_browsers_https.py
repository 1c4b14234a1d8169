"""Over HTTPS: cookies that only this host sets and no plain connection carries, also on the way to a provider."""

from collections.abc import AsyncIterator
from http.cookies import Morsel, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest_asyncio

from shared.access_tokens import CSRF_HEADER
from tests.auth.front import Front, front
from tests.auth.harness import PASSWORD
from tests.auth.test_oidc import issuer, person, provider
from tests.conftest import Components

__all__ = ["issuer"]  # a fixture of another module
PUBLIC_URL = "https://gate.example.com"
LOGIN, REFRESH, ME = "/api/v1/auth/login", "/api/v1/auth/refresh", "/api/v1/auth/me"
CALLBACK = "/api/v1/auth/oidc/corp/callback"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def whole(owner_url: str, components: Components, issuer: str) -> AsyncIterator[Front]:
    changes = {"public_url": PUBLIC_URL, "auth_oidc_providers": (provider(issuer, "corp"),)}
    async with front(owner_url, components.redis_url, **changes) as started:
        yield started


def cookies_of(answer: httpx.Response) -> dict[str, Morsel[str]]:
    """Those that an answer sets, with their attributes."""
    found: SimpleCookie = SimpleCookie()
    for line in answer.headers.get_list("set-cookie"):
        found.load(line)
    return dict(found)


def header(cookies: dict[str, str], csrf: str | None = None) -> dict[str, str]:
    """What a browser sends: by hand, since a client does not send Secure cookies over the tests' plain connection."""
    line = "; ".join(f"{name}={value}" for name, value in cookies.items())
    return {"cookie": line, **({CSRF_HEADER: csrf} if csrf is not None else {})}


async def signed_in(whole: Front) -> tuple[dict[str, str], str]:
    """A browser's cookies, and its token against forged requests."""
    user = await whole.user()
    body = {"username": user.username, "password": PASSWORD, "cookies": True}
    answer = await whole.call("POST", LOGIN, json=body)
    assert answer.status_code == 200, answer.text
    return {name: morsel.value for name, morsel in cookies_of(answer).items()}, answer.json()["csrf_token"]


async def test_every_cookie_is_secure_and_bound_to_this_host(whole: Front) -> None:
    user = await whole.user()
    body = {"username": user.username, "password": PASSWORD, "cookies": True}
    made = cookies_of(await whole.call("POST", LOGIN, json=body))
    assert set(made) == {"__Host-tg_access", "tg_refresh", "__Host-tg_csrf"}
    assert all(morsel["secure"] and not morsel["domain"] for morsel in made.values())
    assert {name: (m["path"], m["samesite"].lower(), bool(m["httponly"])) for name, m in made.items()} == {
        "__Host-tg_access": ("/", "lax", True),
        "tg_refresh": ("/api/v1/auth", "strict", True),
        "__Host-tg_csrf": ("/", "strict", False),
    }


async def test_the_token_is_wanted_twice_in_the_cookies_session_and_in_the_header(whole: Front) -> None:
    cookies, csrf = await signed_in(whole)
    assert (await whole.call("GET", ME, headers=header(cookies))).status_code == 200
    _, foreign = await signed_in(whole)
    for forged in (None, "", foreign):
        planted = cookies if forged is None else {**cookies, "__Host-tg_csrf": forged}
        for path, body in (("/api/v1/keys", {"name": "k"}), (REFRESH, {})):
            answer = await whole.call("POST", path, json=body, headers=header(planted, forged))
            assert (answer.status_code, answer.json()["code"]) == (403, "csrf_failed"), (path, forged)
    assert (await whole.call("POST", "/api/v1/keys", json={"name": "k"}, headers=header(cookies, csrf))).is_success
    renewed = await whole.call("POST", REFRESH, headers=header(cookies, csrf))
    assert renewed.status_code == 200, renewed.text
    after = cookies_of(renewed)
    assert after["tg_refresh"].value != cookies["tg_refresh"]
    assert all(morsel["secure"] for morsel in after.values())


async def test_a_cookie_that_another_host_could_set_is_none_of_ours(whole: Front) -> None:
    cookies, csrf = await signed_in(whole)
    planted = {name.removeprefix("__Host-"): value for name, value in cookies.items()}
    assert (await whole.call("GET", ME, headers=header(planted, csrf))).status_code == 401


async def test_signing_out_takes_every_cookie_away(whole: Front) -> None:
    cookies, csrf = await signed_in(whole)
    answer = await whole.call("POST", "/api/v1/auth/logout", headers=header(cookies, csrf))
    assert answer.status_code == 204, answer.text
    gone = cookies_of(answer)
    assert set(gone) == set(cookies)
    assert all(morsel["secure"] and morsel["max-age"] == "0" for morsel in gone.values())  # else a browser keeps them
    assert (await whole.call("GET", ME, headers=header(cookies))).status_code == 401


async def test_the_state_of_a_sign_in_through_a_provider_is_this_hosts_too(whole: Front, issuer: str) -> None:
    subject, _ = await person(issuer)
    begun = await whole.call("GET", "/api/v1/auth/oidc/corp/start?return_to=/docs")
    state = cookies_of(begun)["__Host-tg_oidc"]
    assert (state["secure"], state["path"], state["domain"], state["httponly"]) == (True, "/", "", True)
    assert state["samesite"].lower() == "lax"
    sent_to = begun.headers["location"]
    assert parse_qs(urlsplit(sent_to).query)["redirect_uri"] == [PUBLIC_URL + CALLBACK]
    async with httpx.AsyncClient(timeout=60, trust_env=False) as browser:
        consented = await browser.post(sent_to, data={"sub": subject})
    query = {name: values[0] for name, values in parse_qs(urlsplit(consented.headers["location"]).query).items()}
    back = f"{CALLBACK}?{urlencode(query)}"
    planted = await whole.call("GET", back, headers=header({"tg_oidc": state.value}))
    assert (planted.status_code, planted.json()["code"]) == (401, "sign_in_refused")
    answer = await whole.call("GET", back, headers=header({"__Host-tg_oidc": state.value}))
    assert (answer.status_code, answer.headers["location"]) == (303, "/docs")
    made = cookies_of(answer)
    assert {"__Host-tg_access", "tg_refresh", "__Host-tg_csrf"} <= set(made)
    assert all(morsel["secure"] for morsel in made.values())
    assert made["__Host-tg_oidc"]["max-age"] == "0"
