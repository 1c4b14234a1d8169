"""What strangers send, at every address of the OpenAPI document, so that a new one is covered."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok

from shared.clock import SystemClock
from shared.identity import HEADER, Identity, IdentityRing
from tests.auth.harness import IDENTITY_KEYS, PASSWORD, Auth, RunningClock, User, running
from tests.conftest import Components
from tests.gateway.harness import Server

INJECTIONS = (
    "' OR '1'='1",
    "'; DROP TABLE auth.user_account; --",
    '" OR ""="',
    "1); DELETE FROM auth.api_key; --",
    "\\'; SELECT pg_sleep(10); --",
    "%27%20OR%201=1",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "\u0000",
    "\ud800",
)
PRIVILEGED: dict[str, Any] = {
    "roles": ["admin"],
    "role_on_installation": "admin",
    "status": "active",
    "kind": "service",
    "user_id": "0190a000-0000-7000-8000-000000000000",
    "org_id": "0190a000-0000-7000-8000-000000000000",
    "plan": "unlimited",
    "version": 99,
    "limit_id": "0190a000-0000-7000-8000-000000000000",
    "email_verified_at": "2030-01-01T00:00:00Z",
    "password_hash": "$argon2id$",
}
SHORT_EXAMPLES, LONG_EXAMPLES = 3, 200
# Hypothesis blames a strategy for whoever uses `random` meanwhile: the loop's thread, while the fuzzer runs in its own.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(owner_url: str, components: Components) -> AsyncIterator[tuple[Auth, str]]:
    """The application on a socket, as the gateway meets it."""
    # No back-off: the tests are one address.
    many = {"auth_sign_in_address_free": 1_000_000, "auth_sign_in_pair_free": 1_000_000}
    async with (
        running(owner_url, components.redis_url, RunningClock, **many) as auth,
        Server(auth.app).running() as server,
    ):
        yield auth, server.url


def operations(auth: Auth) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in auth.app.openapi()["paths"].items():
        for method, operation in found.items():
            yield method.upper(), path, operation


def properties(auth: Auth, operation: dict[str, Any]) -> dict[str, Any]:
    """The fields of an operation's JSON body."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    for option in (schema, *schema.get("anyOf", ())):
        if reference := option.get("$ref"):
            named = auth.app.openapi()["components"]["schemas"][reference.rpartition("/")[2]]
            found: dict[str, Any] = named.get("properties", {})
            return found
    return {}


async def person(auth: Auth, role: str | None = None) -> tuple[User, Identity]:
    user = await auth.user(role)
    return user, await auth.identity_of_token(user.access_token)


async def tables(auth: Auth) -> list[int]:
    """What must not change: people, keys, roles held."""
    async with auth.connect() as connection:
        return [
            await connection.fetchval(f"SELECT count(*) FROM auth.{table}")
            for table in ("user_account", "api_key", "user_role", "audit_log")
        ]


async def test_injected_sql_is_a_value_like_any_other(served: tuple[Auth, str]) -> None:
    auth, _ = served
    _, identity = await person(auth, "operator")
    before = await tables(auth)
    for method, path, operation in operations(auth):
        if path.endswith("/logout"):
            continue
        fields = properties(auth, operation)
        queries = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
        for text in INJECTIONS:
            where = path.replace("{", "").replace("}", "")
            body = json.dumps(dict.fromkeys(fields, text)) if fields else None
            params = {name: text.replace("\ud800", "\ufffd") for name in queries}
            started = time.monotonic()
            answer = await auth.call_as(
                identity, method, where, params=params, content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500 or answer.json()["code"] == "provider_unavailable", (method, path, text)
            assert time.monotonic() - started < 10, (method, path, text)
    after = await tables(auth)
    assert after[0] == before[0]
    assert all(now >= then for now, then in zip(after, before, strict=True))


async def test_no_body_sets_what_is_not_its_to_set(served: tuple[Auth, str]) -> None:
    """Privileged fields in every body: refused where bodies are strict, without effect elsewhere."""
    auth, _ = served
    user, identity = await person(auth)
    for method, path, operation in operations(auth):
        fields = properties(auth, operation)
        if not fields or path.endswith(("/logout", "/keys/revoke")):
            continue
        body = {name: value for name, value in PRIVILEGED.items() if name not in fields}
        body |= {"username": f"{user.username}.x", "email": f"x.{user.email}", "password": PASSWORD, "name": "n"}
        where = path.replace("{", "").replace("}", "")
        if "{" in path:
            where = path.format(**dict.fromkeys(_names(path), user.id))
        answer = await auth.call_as(identity, method, where, json=body)
        assert answer.status_code in {200, 201, 400, 401, 403, 404, 409}, (method, path, answer.text)
    async with auth.connect() as connection:
        query = "SELECT role FROM auth.user_role r JOIN auth.user_account u ON u.id = r.user_id WHERE username LIKE $1"
        roles = await connection.fetch(query, f"{user.username}%")
        kinds = await connection.fetch("SELECT DISTINCT kind FROM auth.user_account")
    assert {row["role"] for row in roles} == {"user"}
    assert {row["kind"] for row in kinds} == {"person"}


def _names(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


async def test_whatever_fits_the_document_or_does_not_never_breaks_the_service(served: tuple[Auth, str]) -> None:
    auth, url = served
    _, identity = await person(auth, "operator")
    await asyncio.to_thread(fuzz, url, identity, SHORT_EXAMPLES)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
async def test_for_long(served: tuple[Auth, str]) -> None:
    auth, url = served
    _, identity = await person(auth, "operator")
    await asyncio.to_thread(fuzz, url, identity, LONG_EXAMPLES)


def fuzz(url: str, identity: Identity, examples: int) -> None:
    """Requests made up from the OpenAPI document. Nothing may be a 5xx but an honest 503."""
    document = httpx.get(f"{url}/openapi.json", timeout=60, trust_env=False).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    ring = IdentityRing(IDENTITY_KEYS, SystemClock())
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def answer(case: schemathesis.Case[Any]) -> httpx.Response:
            sent = case.as_transport_kwargs(base_url=url, headers={HEADER: ring.sign(identity)})
            headers = {name: str(value) for name, value in (sent.get("headers") or {}).items()}
            body, params = sent.get("json"), sent.get("params")
            return client.request(sent["method"], sent["url"], params=params, json=body, headers=headers)

        tried = sum(
            [attack(result.ok(), answer, examples) for result in schema.get_all_operations() if isinstance(result, Ok)]
        )
    assert tried >= 40


def attack(operation: Any, answer: Callable[[schemathesis.Case[Any]], httpx.Response], examples: int) -> int:
    """How many requests were made."""
    if operation.path.endswith("/logout"):
        return 0
    tried = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy())
    def attempt(case: schemathesis.Case[Any]) -> None:
        nonlocal tried
        tried += 1
        answered = answer(case)
        assert answered.status_code < 500 or answered.status_code == 503, (case.method, case.path, answered.text)

    attempt()
    return tried
