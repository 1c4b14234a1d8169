"""Requests made up from the merged OpenAPI document, and what it forbids, through the gateway of a whole stack."""

import gzip
import json
import random
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok

from deploy.local.seed import run_module
from tests.journeys.conftest import until
from tests.journeys.people import User, asking, from_elsewhere
from tests.running_stack import RunningStack

TIMEOUT_S = 120.0
LEAKS = re.compile(r"Traceback|File \"|site-packages|asyncpg|sqlalchemy|postgres(ql)?://|redis://|127\.0\.0\.1:\d")
ENDS_ITS_CALLER = ("/logout", "/sessions", "/password", "/me")  # or changes who it is: what follows would all be 401
LONG_EXAMPLES = 50
# Hypothesis blames a strategy for whoever uses `random` meanwhile.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")


def operations(stack: RunningStack) -> Iterator[Any]:
    """Those of the document that do not end the caller's own session."""
    document: dict[str, Any] = {"tags": []}

    def is_complete() -> bool:  # a service that is slow to tell of itself is left out for some seconds
        document.update(httpx.get(f"{stack.url}/openapi.json", timeout=TIMEOUT_S).json())
        return {tag["name"] for tag in document["tags"]} == {"auth", "billing", "chat", "inference"}

    until(is_complete, within_s=TIMEOUT_S, what="every service is in the document")
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=stack.url)
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        if not result.ok().path.endswith(ENDS_ITS_CALLER):
            yield result.ok()


def attack(operation: Any, answer: Callable[[Any], httpx.Response], examples: int) -> Counter[int]:
    """The statuses of so many requests; none is a 5xx but an honest 503, and none tells of our insides."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy())
    def attempt(case: Any) -> None:
        answered = answer(case)
        statuses[answered.status_code] += 1
        where = (case.method, case.path, answered.status_code, answered.text[:500])
        assert answered.status_code < 500 or answered.status_code == 503, where
        assert answered.headers["x-request-id"], where
        if answered.status_code >= 400:
            assert not LEAKS.search(answered.text), where

    attempt()
    return statuses


class Caller(NamedTuple):
    """Whose key and session a stranger's request carries."""

    key: str
    session: str

    def authorization(self, path: str) -> str:
        return f"Bearer {self.session if path.startswith('/api/v1/auth/') else self.key}"


@pytest.fixture
def administrator(stack: RunningStack) -> Caller:
    """One of the test's own, whose limits nobody else draws on."""
    name, password = f"admin-{secrets.token_hex(6)}", secrets.token_urlsafe(18)
    named = ("--username", name, "--email", f"{name}@example.com", "--key-name", name)
    limits = [f"--limit={window}=10000" for window in ("minute", "hour", "day")]
    printed = run_module(
        stack.stack.layout,
        ("services.auth", "bootstrap", *named, "--role", "admin", *limits),
        {**stack.stack.services.administration("auth"), "TOLLGATE_BOOTSTRAP_PASSWORD": password},
    )
    with httpx.Client(base_url=stack.url, timeout=TIMEOUT_S, transport=from_elsewhere()) as anonymous:
        tokens = anonymous.post("/api/v1/auth/login", json={"username": name, "password": password})
    assert tokens.status_code == 200, tokens.text
    return Caller(json.loads(printed.strip().splitlines()[-1])["key"], tokens.json()["access_token"])


def assault(stack: RunningStack, caller: Caller, examples: int, only: str = "/") -> Counter[int]:
    """Requests to every operation whose path begins so, with the caller's credentials; their statuses."""
    statuses: Counter[int] = Counter()
    broken: list[str] = []
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False, transport=from_elsewhere()) as client:

        def answer(case: Any) -> httpx.Response:
            sent = case.as_transport_kwargs(base_url=stack.url)
            made_up = (sent.get("headers") or {}).items()  # credentials, too; some are no header at all
            headers = {name: str(value).strip() for name, value in made_up if name.lower() != "authorization"}
            headers["authorization"] = caller.authorization(case.path)
            body: dict[str, Any] = {"json": sent["json"]} if "json" in sent else {}
            if (data := sent.get("data")) is not None:
                body = {"content" if isinstance(data, bytes | str) else "data": data}
            return client.request(sent["method"], sent["url"], params=sent.get("params"), headers=headers, **body)

        for operation in operations(stack):
            if operation.path.startswith(only):
                try:
                    statuses += attack(operation, answer, examples)
                except AssertionError as e:
                    broken.append(str(e)[:1_000])
    print(f"{statuses.total()} requests to operations of {only}: {dict(statuses)}")
    assert broken == []
    assert statuses[401] < statuses.total() // 2  # it was let in, mostly
    return statuses


@pytest.mark.torture
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("examples", [1, LONG_EXAMPLES])
def test_whatever_the_document_allows_or_forbids_breaks_nothing(
    stack: RunningStack, unhurried_user: User, examples: int
) -> None:
    session = unhurried_user.session.headers["authorization"].removeprefix("Bearer ")
    assert assault(stack, Caller(unhurried_user.key, session), examples).total() > 60


@pytest.mark.parametrize(
    "examples",
    [1, pytest.param(LONG_EXAMPLES, marks=(pytest.mark.torture, pytest.mark.timeout(7_200)))],
)
def test_nothing_that_only_an_administrator_may_ask_breaks_anything(
    stack: RunningStack, administrator: Caller, examples: int
) -> None:
    statuses = assault(stack, administrator, examples, "/api/v1/admin/")
    assert statuses.total() > 15
    assert statuses[403] == 0


def test_a_compressed_body_is_refused_and_never_inflated(unhurried_user: User) -> None:
    packed = {"content-encoding": "gzip", "content-type": "application/json"}
    for body in (json.dumps(asking()).encode(), b"0" * 50_000_000):
        answered = unhurried_user.api.post(
            "/v1/chat/completions", content=gzip.compress(body), headers=packed, timeout=TIMEOUT_S
        )
        assert answered.status_code in (400, 415), answered.text
        assert not LEAKS.search(answered.text)


def test_a_body_of_noise_is_a_clean_refusal(unhurried_user: User) -> None:
    chance = random.Random(6)
    for path in ("/v1/chat/completions", "/v1/embeddings", "/api/v1/keys"):
        for _ in range(5):
            answered = unhurried_user.api.post(
                path, content=chance.randbytes(200), headers={"content-type": "application/json"}, timeout=TIMEOUT_S
            )
            assert 400 <= answered.status_code < 500, (path, answered.text)
            assert not LEAKS.search(answered.text)
