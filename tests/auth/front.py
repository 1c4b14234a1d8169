"""Auth behind a real gateway, over real sockets: what a client meets."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from services.gateway.settings import GatewaySettings
from tests.auth.harness import PASSWORD, Auth, RunningClock, User, running
from tests.conftest import role_url
from tests.gateway.harness import Backend, Gateway, Server, backend, gateway
from tests.gateway.harness import settings as gateway_settings


@dataclass
class Front:
    """A client at the public port. The other services behind the gateway echo."""

    auth: Auth
    gateway: Gateway
    others: Backend
    configured: GatewaySettings  # for more gateways of the same

    @property
    def http(self) -> httpx.AsyncClient:
        return self.gateway.http

    async def call(self, method: str, path: str, *, credential: str = "", **request: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {credential}"} if credential else {}
        return await self.http.request(method, path, headers={**headers, **request.pop("headers", {})}, **request)

    async def user(self, role: str | None = None) -> User:
        """A fresh user, signed in; with a role on the installation if one is named."""
        name = f"user-{secrets.token_hex(6)}"
        body = {"username": name, "email": f"{name}@example.com", "password": PASSWORD}
        made = await self.call("POST", "/api/v1/auth/register", json=body)
        assert made.status_code == 201, made.text
        user_id = made.json()["user_id"]
        if role:
            async with self.auth.connect() as connection:
                await connection.execute("INSERT INTO auth.user_role VALUES ($1, $2)", user_id, role)
        tokens = (await self.call("POST", "/api/v1/auth/login", json=body)).json()
        pair = (tokens["access_token"], tokens["refresh_token"])
        return User(user_id, made.json()["org_id"], name, body["email"], *pair)

    async def key(self, user: User, **body: Any) -> dict[str, Any]:
        answer = await self.call("POST", "/api/v1/keys", credential=user.access_token, json={"name": "k", **body})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    async def reaches_models(self, credential: str) -> int:
        """What the credential gets at an address of another service, which asks auth nothing."""
        return (await self.call("GET", "/v1/models", credential=credential)).status_code


@asynccontextmanager
async def front(owner_url: str, redis_url: str, **changes: Any) -> AsyncIterator[Front]:
    """Both services; `changes` are settings of auth's, and `public_url` of the gateway's too."""
    both = {name: changes[name] for name in ("public_url",) if name in changes}
    async with (
        running(owner_url, redis_url, RunningClock, **changes) as auth,
        Server(auth.app).running() as server,
        backend() as others,
    ):
        configured = gateway_settings(
            redis_url,
            role_url(owner_url, "tollgate_gateway"),
            others.url,
            auth_url=server.url,
            gateway_anonymous_per_minute=100_000,
            gateway_anonymous_per_hour=1_000_000,
            gateway_user_per_minute=100_000,
            gateway_user_per_hour=1_000_000,
            gateway_user_per_day=10_000_000,
            **both,
        )
        async with gateway(configured) as running_gateway:
            yield Front(auth, running_gateway, others, configured)
