"""A customer of the running stack, who has only the gateway's address: an account, a wallet, a key, clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

import httpx
import openai

TIMEOUT_S = 30.0
PAGE_MAX = 100
RETRIES_MAX = 10
QUESTION = ({"role": "user", "content": "What is Tollgate?"},)
LONG_QUESTION = ({"role": "user", "content": "Recite the whole manual."},)
"""chat-mini answers with about 700 tokens."""


@dataclass
class User:
    """A registered user. `session` acts with the access token, `api` with the key; each has limits of its own."""

    url: str
    name: str
    password: str
    user_id: str
    org_id: str
    session: httpx.Client
    key_id: str = ""
    key: str = field(default="", repr=False)
    clients: ExitStack = field(default_factory=ExitStack, repr=False)

    @cached_property
    def api(self) -> httpx.Client:
        """An HTTP client with the key."""
        return self.clients.enter_context(client(self.url, self.key))

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official SDK, without its own retries, so that tests see what the server says."""
        settings = {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, "timeout": TIMEOUT_S}
        return self.clients.enter_context(openai.OpenAI(**{**settings, **options}))

    def new_key(self, **fields: Any) -> dict[str, Any]:
        """Create another key; the whole answer, with the secret."""
        body = {"name": f"key-{secrets.token_hex(3)}", **fields}
        answer = patiently(lambda: self.session.post("/api/v1/keys", json=body))
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def wallet(self) -> Wallet:
        answer = patiently(lambda: self.api.get("/api/v1/billing/wallet"))
        assert answer.status_code == 200, answer.text
        return Wallet.read(answer.json())

    def pages(self, path: str) -> list[dict[str, Any]]:
        """Every entry of a list in the wallet's history, newest first."""
        found: list[dict[str, Any]] = []
        parameters: dict[str, Any] = {"limit": PAGE_MAX}
        while True:
            answer = patiently(lambda: self.api.get(path, params=parameters))
            assert answer.status_code == 200, answer.text
            found += answer.json()["data"]
            if answer.json()["next_cursor"] is None:
                return found
            parameters["cursor"] = answer.json()["next_cursor"]

    def usage(self) -> list[dict[str, Any]]:
        """What every request of this user's organisation used and cost."""
        return self.pages("/api/v1/billing/usage")

    def ask(self, **body: Any) -> httpx.Response:
        """One completion without a stream."""
        return self.api.post("/v1/chat/completions", json=asking(**body))


@dataclass(frozen=True)
class Wallet:
    """Credits, exactly."""

    balance: Decimal
    held: Decimal
    available: Decimal

    @staticmethod
    def read(answer: Mapping[str, str]) -> Wallet:
        return Wallet(*(Decimal(answer[name]) for name in ("balance", "held", "available")))


def patiently(send: Callable[[], httpx.Response]) -> httpx.Response:
    """Send again what is refused for now, as every SDK does."""
    for _ in range(RETRIES_MAX):
        answer = send()
        if answer.status_code not in (502, 503, 504):
            break
        time.sleep(float(answer.headers.get("retry-after", 1)))
    return answer


def asking(**body: Any) -> dict[str, Any]:
    return {"model": "chat-mini", "messages": list(QUESTION), **body}


def client(url: str, token: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_S)


def from_elsewhere() -> httpx.HTTPTransport:
    """Connects from an address of its own: the limits of anonymous requests are by address."""
    host = ".".join(str(1 + secrets.randbelow(250)) for _ in range(3))
    return httpx.HTTPTransport(local_address=f"127.{host}")


def register(url: str) -> User:
    """Register, sign in, create a key: all through the gateway, as a newcomer would."""
    name, password = f"user-{secrets.token_hex(6)}", secrets.token_urlsafe(18)
    stack = ExitStack()
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, transport=from_elsewhere()) as anonymous:
        made = anonymous.post(
            "/api/v1/auth/register", json={"username": name, "email": f"{name}@example.com", "password": password}
        )
        assert made.status_code == 201, made.text
        tokens = anonymous.post("/api/v1/auth/login", json={"username": name, "password": password})
        assert tokens.status_code == 200, tokens.text
    account = made.json()
    user = User(
        url=url,
        name=name,
        password=password,
        user_id=account["user_id"],
        org_id=account["org_id"],
        session=stack.enter_context(client(url, tokens.json()["access_token"])),
        clients=stack,
    )
    key = user.new_key()
    user.key, user.key_id = key["key"], key["id"]
    return user


NewUser = Callable[[], User]


@dataclass(frozen=True)
class Prices:
    """Nano-credits per request, and per million tokens of each class."""

    per_request: int
    input: int
    cached_input: int
    output: int

    def cost(self, usage: Mapping[str, Any]) -> Decimal:
        """Credits for the usage that a response reports."""
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return self.of(usage["prompt_tokens"], cached, usage["completion_tokens"])

    def of(self, input_tokens: int, cached_input_tokens: int, output_tokens: int) -> Decimal:
        """Credits, rounded up once to a nano-credit."""
        millionths = (
            (input_tokens - cached_input_tokens) * self.input
            + cached_input_tokens * self.cached_input
            + output_tokens * self.output
        )
        return Decimal(self.per_request - (-millionths // 10**6)) / 10**9


def nano(credits_: str) -> int:
    """A decimal string of credits in nano-credits, exactly."""
    value = Decimal(credits_) * 10**9
    assert value == int(value)
    return int(value)
