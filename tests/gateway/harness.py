"""The gateway in this process on real sockets, a service behind it that tests can steer, keys in auth's real tables."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import uvicorn
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from deploy.local.ports import pick_port
from services.auth.cli import migrate_urls
from services.auth.clients import ChangeChannel
from services.auth.domain import KeyEvent, SessionEvent
from services.gateway.app import build
from services.gateway.settings import GatewaySettings
from shared import apikeys
from shared.clock import SystemClock
from shared.database import dsn
from shared.http_protocol import GuardedHttpProtocol
from shared.identity import HEADER, Identity, IdentityRing
from shared.web import Readiness
from tests.conftest import role_url
from tests.gateway.outages import DEADLINE_S, eventually

IDENTITY_KEYS = f"test:{base64.b64encode(b'i' * 32).decode()}"
PEPPERS = f"1:{base64.b64encode(b'p' * 32).decode()}"
ASKED_BY_GATEWAYS = ("/healthz", "/.well-known/jwks.json", "/openapi.json")  # for themselves, at any time
DEFAULT_SCOPES = ("chat", "models", "inference", "billing:read")


def migrate(owner_url: str) -> None:
    """Auth's schema and both roles."""
    migrate_urls(owner_url, role_url(owner_url, "tollgate_auth"), role_url(owner_url, "tollgate_gateway"))


class Server(uvicorn.Server):
    """uvicorn without signal handlers, on a free port."""

    def __init__(self, app: Any, port: int = 0, protocol: Any = GuardedHttpProtocol) -> None:
        self.port = port or pick_port()
        super().__init__(
            uvicorn.Config(
                app,
                host="127.0.0.1",
                port=self.port,
                loop="none",
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=1,
                timeout_keep_alive=600,  # a test on a busy machine may come back late to a connection
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        task = asyncio.create_task(self.serve())
        await eventually(lambda: self.started or task.done())
        assert self.started
        try:
            yield self
        finally:
            self.should_exit = True
            await task


@dataclass
class Seen:
    """A request as the service behind the gateway saw it."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k == name), None)

    @property
    def identity(self) -> Identity:
        return IdentityRing(IDENTITY_KEYS, SystemClock()).verify(self.header(HEADER))


Handler = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass
class Backend:
    """One ASGI application that plays all four services: it echoes, unless a test gives a path to a handler."""

    seen: list[Seen] = field(default_factory=list)
    handlers: dict[str, Handler] = field(default_factory=dict)
    url: str = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if handler := self.handlers.get(scope["path"]):
            await handler(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = [(k.decode(), v.decode("latin-1")) for k, v in scope["headers"]]
        if scope["path"] in ASKED_BY_GATEWAYS and "x-request-id" not in dict(headers):
            await answer(send, 200, b"{}")
            return
        self.seen.append(Seen(scope["method"], scope["path"], scope["query_string"].decode(), headers, body))
        await answer(send, 200, json.dumps({"path": scope["path"], "bytes": len(body)}).encode())

    @property
    def last(self) -> Seen:
        return self.seen[-1]


async def answer(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """A whole response."""
    own = headers or [(b"content-type", b"application/json")]
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *length]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def backend() -> AsyncIterator[Backend]:
    app = Backend()
    async with Server(app).running() as server:
        app.url = server.url
        yield app


@dataclass(frozen=True)
class Key:
    """An API key that stands in auth's tables."""

    secret: str
    digest: str
    key_id: UUID
    org_id: UUID
    user_id: UUID

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}


@dataclass
class Directory:
    """Auth's tables, and the channel by which auth tells gateways of changes."""

    connection: asyncpg.Connection
    redis: Redis | RedisCluster

    async def create_key(
        self,
        *,
        scopes: tuple[str, ...] = DEFAULT_SCOPES,
        roles: tuple[str, ...] = ("user",),
        limits: dict[str, int] | None = None,
        models: list[str] | None = None,
        expires_at: datetime | None = None,
        allowed_addresses: list[str] | None = None,
        plan: str = "default",
        like: Key | None = None,
    ) -> Key:
        """A key of a new user in a new organisation, or of the same as another key."""
        key_id = uuid4()
        user_id, org_id = (like.user_id, like.org_id) if like else await self._create_owner(roles, plan)
        secret = apikeys.generate()
        digest = apikeys.Peppers(PEPPERS).digest(secret)
        await self.connection.execute(
            """INSERT INTO auth.api_key (id, org_id, user_id, name, prefix, digest, pepper, scopes, models, limits,
                                         limit_id, expires_at, allowed_addresses, created_at)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, now())""",
            key_id,
            org_id,
            user_id,
            key_id.hex,
            apikeys.display_prefix(secret),
            digest.hex,
            digest.pepper,
            list(scopes),
            models,
            json.dumps(limits or {}),
            uuid4(),
            expires_at,
            allowed_addresses,
        )
        return Key(secret, digest.hex, key_id, org_id, user_id)

    async def create_session(self) -> dict[str, str]:
        """A session of a new user in a new organisation: what its access tokens say of it."""
        key = await self.create_key()
        session_id = uuid4()
        await self.connection.execute(
            """INSERT INTO auth.session (id, user_id, org_id, created_at, last_used_at, expires_at)
               VALUES ($1, $2, $3, now(), now(), now() + interval '1 day')""",
            session_id,
            key.user_id,
            key.org_id,
        )
        return {"sub": str(key.user_id), "org": str(key.org_id), "sid": str(session_id)}

    async def end_session(self, session: dict[str, str], *, announce: bool = True) -> None:
        """As auth does it: the row, then Redis."""
        version = await self.connection.fetchval(
            "UPDATE auth.session SET revoked_at = now(), version = version + 1 WHERE id = $1 RETURNING version",
            UUID(session["sid"]),
        )
        if announce:
            event = SessionEvent(id=0, session_id=UUID(session["sid"]), org_id=UUID(session["org"]), version=version)
            await ChangeChannel(self.redis).announce([event])

    async def _create_owner(self, roles: tuple[str, ...], plan: str) -> tuple[UUID, UUID]:
        user_id, org_id = uuid4(), uuid4()
        name = user_id.hex
        execute = self.connection.execute
        await execute(
            "INSERT INTO auth.user_account (id, username, email, password_hash) VALUES ($1, $2, $3, '-')",
            user_id,
            name,
            f"{name}@example.com",
        )
        for role in roles:
            await execute("INSERT INTO auth.user_role (user_id, role) VALUES ($1, $2)", user_id, role)
        await execute("INSERT INTO auth.organization (id, name, plan) VALUES ($1, $2, $3)", org_id, name, plan)
        await execute("INSERT INTO auth.membership (org_id, user_id, role) VALUES ($1, $2, 'owner')", org_id, user_id)
        return user_id, org_id

    async def revoke(self, key: Key, *, announce: bool = True, published: bool = True) -> None:
        """As auth does it: the row, then Redis; without `published`, no gateway hears the message."""
        version = await self.connection.fetchval(
            """UPDATE auth.api_key SET status = 'revoked', revoked_at = now(), version = version + 1
                WHERE id = $1 RETURNING version""",
            key.key_id,
        )
        if not published:
            await self.redis.set(
                apikeys.version_name(str(key.org_id), str(key.key_id)), version, ex=apikeys.CACHE_TTL_S
            )
            await self.redis.delete(apikeys.record_name(key.digest))
        elif announce:
            await self.announce(key, version)

    async def set_limits(self, key: Key, limits: dict[str, int]) -> None:
        version = await self.connection.fetchval(
            "UPDATE auth.api_key SET limits = $2, version = version + 1 WHERE id = $1 RETURNING version",
            key.key_id,
            json.dumps(limits),
        )
        await self.announce(key, version)

    async def announce(self, key: Key, version: int) -> None:
        """Deliver the change through auth's own code."""
        event = KeyEvent(id=0, key_id=key.key_id, org_id=key.org_id, digest=key.digest, version=version)
        await ChangeChannel(self.redis).announce([event])


@dataclass
class Gateway:
    """A running gateway."""

    url: str
    internal_url: str
    http: httpx.AsyncClient

    async def metric(self, name: str, **labels: str) -> float:
        """The value of a sample on the internal listener; 0 when it is not there."""
        wanted = {f'{k}="{v}"' for k, v in labels.items()}
        for line in (await self.http.get(f"{self.internal_url}/metrics")).text.splitlines():
            if line.startswith((f"{name} ", f"{name}{{")) and all(w in line for w in wanted):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def ready(self, **checks: str) -> None:
        """Wait until /readyz shows these."""

        async def shows() -> bool:
            report = (await self.http.get("/readyz")).json()["checks"]
            return all(report.get(k) == v for k, v in checks.items())

        await eventually(shows)


def settings(redis_url: str, database_url: str, service_url: str, **changes: Any) -> GatewaySettings:
    values: dict[str, Any] = {
        "identity_keys": SecretStr(IDENTITY_KEYS),
        "api_key_peppers": SecretStr(PEPPERS),
        "redis_url": SecretStr(redis_url),
        "gateway_database_url": SecretStr(database_url),
        "auth_url": service_url,
        "billing_url": service_url,
        "chat_url": service_url,
        "inference_url": service_url,
        # A busy test machine is not an outage.
        "gateway_redis_timeout_ms": 20_000,
        "gateway_database_timeout_ms": 20_000,
        "gateway_connect_timeout_ms": 20_000,
        "gateway_jwks_timeout_ms": 20_000,
        "gateway_unknown_keys_per_minute": 10_000,
        "gateway_heartbeat_interval_s": 0.05,
        "gateway_heartbeat_ttl_s": 2,
        "gateway_readiness_ttl_s": 0.01,
    }
    return GatewaySettings(**{**values, **changes})


@asynccontextmanager
async def gateway(
    configured: GatewaySettings, there: tuple[str, ...] = ("redis", "postgres")
) -> AsyncIterator[Gateway]:
    """The whole service: both listeners and its background tasks; it has reached what is `there`."""
    async with AsyncExitStack() as stack:
        service = await build(configured, stack, Readiness())
        servers = [await stack.enter_async_context(Server(s.app, protocol=s.protocol).running()) for s in service.http]
        tasks = [asyncio.create_task(make()) for make in service.tasks.values()]
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=servers[0].url, timeout=DEADLINE_S, trust_env=False)
        )
        try:
            running = Gateway(servers[0].url, servers[1].url, http)
            await running.ready(**dict.fromkeys(there, "ok"))
            yield running
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def connect(owner_url: str) -> asyncpg.Connection:
    return await asyncpg.connect(dsn(owner_url))
