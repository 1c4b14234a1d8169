"""Sign-in through a real OpenID provider, which runs in a process of its own."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr

from deploy.local.ports import pick_port
from services.auth.domain.oidc import OidcProvider, is_own_page
from tests.auth.front import Front, front
from tests.auth.harness import PASSWORD, User
from tests.conftest import Components

CALLBACK = "/api/v1/auth/oidc/{}/callback"
START_S, TIMEOUT_S = 120, 60


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = pick_port()
    command = [sys.executable, "-m", "oidc_provider_mock", "--port", str(port), "--require-nonce", "true"]
    with (tmp_path_factory.mktemp("oidc") / "log").open("w") as log:
        environment = {"PATH": os.environ["PATH"]}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=Path("/"))
    try:
        wait_listening(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the provider ended"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=START_S):
            return
        time.sleep(0.05)
    raise AssertionError(f"the provider does not listen after {START_S} s")


def provider(issuer: str, name: str, **changes: Any) -> OidcProvider:
    secret = SecretStr("the client's secret")
    return OidcProvider(name=name, issuer=issuer, client_id=f"tollgate-{name}", client_secret=secret, **changes)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def whole(owner_url: str, components: Components, issuer: str) -> AsyncIterator[Front]:
    providers = (
        provider(issuer, "corp"),
        provider(issuer, "trusted", link_by_email=True),
        provider(issuer, "known-only", create_users=False),
        provider(f"http://127.0.0.1:{pick_port()}", "gone"),
    )
    async with front(owner_url, components.redis_url, auth_oidc_providers=providers) as started:
        yield started


class Browser:
    """One browser: it follows redirects by hand, to the provider and back to the gateway."""

    def __init__(self, whole: Front) -> None:
        self.http = httpx.AsyncClient(base_url=whole.gateway.url, timeout=TIMEOUT_S, trust_env=False)
        self.state = ""

    async def begin(self, name: str, return_to: str = "") -> str:
        """Where it is sent."""
        path = f"/api/v1/auth/oidc/{name}/start"
        answer = await self.http.get(path, params={"return_to": return_to} if return_to else {})
        assert answer.status_code == 303, answer.text
        return answer.headers["location"]

    async def consent(self, location: str, subject: str) -> dict[str, str]:
        """What the provider sends back."""
        answer = await self.http.post(location, data={"sub": subject})
        assert answer.status_code == 302, answer.text
        return {name: values[0] for name, values in parse_qs(urlsplit(answer.headers["location"]).query).items()}

    async def come_back(self, name: str, query: dict[str, str]) -> httpx.Response:
        return await self.http.get(f"{CALLBACK.format(name)}?{urlencode(query)}")

    async def sign_in(self, name: str, subject: str, return_to: str = "") -> httpx.Response:
        return await self.come_back(name, await self.consent(await self.begin(name, return_to), subject))


@pytest_asyncio.fixture
async def browser(whole: Front) -> AsyncIterator[Browser]:
    made = Browser(whole)
    yield made
    await made.http.aclose()


async def person(issuer: str, **claims: Any) -> tuple[str, str]:
    """Somebody whom the provider knows: subject and address."""
    subject = f"s-{secrets.token_hex(6)}"
    known = {"email": f"{subject}@example.com", "email_verified": True, "preferred_username": subject, **claims}
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        assert (await client.put(f"{issuer}/users/{subject}", json=known)).status_code == 204
    return subject, known["email"]


async def who(whole: Front, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    me = await whole.call("GET", "/api/v1/auth/me", credential=answer.json()["access_token"])
    found: dict[str, Any] = me.json()
    return found


async def test_somebody_new_gets_an_account_and_the_same_one_again(whole: Front, issuer: str, browser: Browser) -> None:
    subject, email = await person(issuer)
    first = await who(whole, await browser.sign_in("corp", subject))
    assert (first["username"], first["email"], first["roles"]) == (subject, email, ["user"])
    again = await who(whole, await browser.sign_in("corp", subject))
    assert again["user_id"] == first["user_id"]
    wrong = await whole.call("POST", "/api/v1/auth/login", json={"username": subject, "password": "!"})
    assert (wrong.status_code, wrong.json()["code"]) == (401, "invalid_credentials")


async def test_a_browser_comes_back_to_its_page_with_cookies(whole: Front, issuer: str, browser: Browser) -> None:
    subject, _ = await person(issuer)
    answer = await browser.sign_in("corp", subject, "/docs?tab=1#keys")
    assert (answer.status_code, answer.headers["location"]) == (303, "/docs?tab=1#keys")
    assert answer.headers["cache-control"] == "no-store"
    me = await browser.http.get("/api/v1/auth/me")
    assert (me.status_code, me.json()["username"]) == (200, subject)


async def test_a_sign_in_of_another_browser_or_for_another_provider_or_a_second_time_is_refused(
    whole: Front, issuer: str, browser: Browser
) -> None:
    subject, _ = await person(issuer)
    query = await browser.consent(await browser.begin("corp"), subject)
    stranger = Browser(whole)
    other_state = await stranger.begin("corp")
    codes = [
        (await stranger.come_back("corp", query)),  # a link that somebody was sent
        (await browser.come_back("trusted", query)),
        (await browser.come_back("corp", {**query, "state": parse_qs(urlsplit(other_state).query)["state"][0]})),
        (await browser.come_back("corp", {**query, "state": ""})),
        (await browser.come_back("corp", {"error": "access_denied", "state": query["state"]})),
    ]
    assert {(answer.status_code, answer.json()["code"]) for answer in codes} == {(401, "sign_in_refused")}
    assert (await browser.come_back("corp", query)).status_code == 200
    assert (await browser.come_back("corp", query)).status_code == 401
    await stranger.http.aclose()


async def test_a_code_that_the_provider_does_not_know_is_refused(whole: Front, browser: Browser) -> None:
    state = parse_qs(urlsplit(await browser.begin("corp")).query)["state"][0]
    answer = await browser.come_back("corp", {"code": "made up", "state": state})
    assert (answer.status_code, answer.json()["code"]) == (401, "sign_in_refused")


async def taken(whole: Front, issuer: str) -> tuple[User, str]:
    """A user with a password, and a subject of the provider with the same address."""
    user = await whole.user()
    subject, _ = await person(issuer, email=user.email)
    return user, subject


async def test_an_account_is_linked_by_address_only_where_both_sides_are_sure(
    whole: Front, issuer: str, browser: Browser
) -> None:
    user, subject = await taken(whole, issuer)
    refused = [await browser.sign_in(name, subject) for name in ("corp", "trusted")]
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(409, "account_exists")}
    async with whole.auth.connect() as connection:
        await connection.execute("UPDATE auth.user_account SET email_verified_at = now() WHERE id = $1", user.id)
    assert (await browser.sign_in("corp", subject)).status_code == 409
    assert (await who(whole, await browser.sign_in("trusted", subject)))["user_id"] == user.id
    login = await whole.call("POST", "/api/v1/auth/login", json={"username": user.username, "password": PASSWORD})
    assert login.status_code == 200


async def test_an_address_that_the_provider_did_not_verify_counts_for_nothing(
    whole: Front, issuer: str, browser: Browser
) -> None:
    for claims in ({"email_verified": False}, {"email_verified": "yes"}, {"email": ""}, {"email": ["a@example.com"]}):
        subject, _ = await person(issuer, **claims)
        answer = await browser.sign_in("trusted", subject)
        assert (answer.status_code, answer.json()["code"]) == (401, "email_not_verified"), claims


async def test_a_disabled_user_and_one_whom_nobody_invited_stay_out(
    whole: Front, issuer: str, browser: Browser
) -> None:
    subject, _ = await person(issuer)
    nobody = await browser.sign_in("known-only", subject)
    assert (nobody.status_code, nobody.json()["code"]) == (401, "no_account")
    user = await who(whole, await browser.sign_in("corp", subject))
    async with whole.auth.connect() as connection:
        await connection.execute("UPDATE auth.user_account SET status = 'disabled' WHERE id = $1", user["user_id"])
    assert (await browser.sign_in("corp", subject)).status_code == 401


async def test_a_provider_that_is_away_or_unknown_is_said_so(whole: Front, browser: Browser) -> None:
    away = await browser.http.get("/api/v1/auth/oidc/gone/start")
    assert (away.status_code, away.json()["code"]) == (503, "provider_unavailable")
    unknown = await browser.http.get("/api/v1/auth/oidc/nobody/start")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "provider_not_found")
    listed = (await browser.http.get("/api/v1/auth/oidc")).json()["data"]
    assert [p["name"] for p in listed] == ["corp", "trusted", "known-only", "gone"]


async def test_one_returns_to_own_pages_only(whole: Front, browser: Browser) -> None:
    for place in ("/", "/docs", "/a/b?c=d#e"):
        assert is_own_page(place)
    for place in ("//evil.example", "/\\evil.example", "https://evil.example", "docs", "/a\r\nset-cookie: x", "/a b"):
        assert not is_own_page(place)
        answer = await browser.http.get("/api/v1/auth/oidc/corp/start", params={"return_to": place})
        assert answer.status_code == 400, place
