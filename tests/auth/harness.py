"""Auth's application in this process, and a stand-in for the gateway in front of it: it verifies tokens by the JWKS,
looks keys up in the view as the gateway's role, and signs the identity header, as the real one does.
"""

import asyncio
import base64
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
from fastapi import FastAPI
from jose import jwt
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from redis.asyncio import Redis

from services.auth.app import compose, create_app
from services.auth.cli import migrate_urls
from services.auth.service import Services
from services.auth.settings import AuthSettings
from shared.apikeys import Peppers
from shared.clock import FixedClock, SystemClock
from shared.database import dsn
from shared.identity import HEADER, Identity, IdentityRing
from shared.web import Readiness
from tests.conftest import role_url

PASSWORD = "correct horse battery staple"
IDENTITY_KEYS = f"test:{base64.b64encode(b'i' * 32).decode()}"
PEPPERS = f"1:{base64.b64encode(b'p' * 32).decode()}"
SECRET_KEY = base64.b64encode(b"s" * 32).decode()
ADDRESS = "203.0.113.7"


def migrate(owner_url: str) -> None:
    """Auth's schema and both roles."""
    migrate_urls(owner_url, role_url(owner_url, "tollgate_auth"), role_url(owner_url, "tollgate_gateway"))


def settings(owner_url: str, redis_url: str, **changes: Any) -> AuthSettings:
    """Small argon2 parameters: the tests are about behaviour."""
    values: dict[str, Any] = {
        "identity_keys": SecretStr(IDENTITY_KEYS),
        "auth_database_url": SecretStr(role_url(owner_url, "tollgate_auth")),
        "redis_url": SecretStr(redis_url),
        "api_key_peppers": SecretStr(PEPPERS),
        "auth_secret_key": SecretStr(SECRET_KEY),
        "auth_self_service_orgs": True,
        "auth_argon2_time_cost": 1,
        "auth_argon2_memory_kib": 64,
    }
    return AuthSettings(**{**values, **changes})


def standing_clock() -> FixedClock:
    return FixedClock(SystemClock().now())


class RunningClock(FixedClock):
    """The system's clock, ahead by what `advance` adds: for tests with somebody else's clock beside it."""

    def __init__(self) -> None:
        started = SystemClock().now()
        super().__init__(started)
        self._started = started

    def now(self) -> datetime:
        return SystemClock().now() + (super().now() - self._started)


@dataclass(frozen=True)
class User:
    """Somebody who registered, and signed in."""

    id: str
    org_id: str
    username: str
    email: str
    access_token: str
    refresh_token: str


@dataclass
class Auth:
    """The application, its clock, and the way in through the stand-in gateway."""

    http: httpx.AsyncClient
    services: Services
    settings: AuthSettings
    clock: FixedClock
    registry: CollectorRegistry
    owner_url: str
    redis: Redis
    app: FastAPI

    async def call(self, method: str, path: str, *, token: str = "", key: str = "", **request: Any) -> httpx.Response:
        """A request as the gateway would relay it: with a token, with a key, or from nobody."""
        if token:
            identity = await self.identity_of_token(token)
        elif key:
            identity = await self.identity_of_key(key)
        else:
            identity = Identity("anonymous")
        return await self.call_as(identity, method, path, **request)

    async def call_as(self, identity: Identity, method: str, path: str, **request: Any) -> httpx.Response:
        ring = IdentityRing(IDENTITY_KEYS, self.clock)
        headers = {HEADER: ring.sign(identity), "x-forwarded-for": ADDRESS, **request.pop("headers", {})}
        return await self.http.request(method, path, headers=headers, **request)

    async def identity_of_token(self, token: str) -> Identity:
        claims = self.claims(token, (await self.http.get("/.well-known/jwks.json")).json())
        return Identity(
            "user",
            user_id=claims["sub"],
            org_id=claims["org"],
            session_id=claims["sid"],
            plan=claims["plan"],
            roles=tuple(claims["roles"]),
            scopes=tuple(claims["scope"].split()),
        )

    def claims(self, token: str, jwks: dict[str, Any]) -> dict[str, Any]:
        """What the gateway requires of a token; the clock is the test's own."""
        options = {"verify_exp": False, "verify_iat": False}
        claims: dict[str, Any] = jwt.decode(
            token, jwks, algorithms=["ES256"], audience="tollgate", issuer="tollgate", options=options
        )
        assert claims["type"] == "access"
        assert claims["exp"] > self.clock.now().timestamp()
        return claims

    async def identity_of_key(self, key: str) -> Identity:
        row = await self.key_row(key)
        assert row is not None
        assert row["status"] == "active"
        return Identity(
            "key",
            user_id=str(row["user_id"]),
            org_id=str(row["org_id"]),
            key_id=str(row["key_id"]),
            plan=row["plan"],
            roles=tuple(row["roles"]),
            scopes=tuple(row["scopes"]),
            models=None if row["models"] is None else tuple(row["models"]),
            limit_id=str(row["limit_id"]),
        )

    async def key_row(self, key: str) -> asyncpg.Record | None:
        """What the gateway's role reads of a key."""
        digests = [d.hex for d in Peppers(PEPPERS).candidates(key)]
        async with self.connect("tollgate_gateway") as connection:
            return await connection.fetchrow("SELECT * FROM auth.key_view WHERE digest = ANY($1)", digests)

    @asynccontextmanager
    async def connect(self, role: str | None = None) -> AsyncIterator[asyncpg.Connection]:
        """A connection as a role, or as the owner."""
        connection = await asyncpg.connect(dsn(role_url(self.owner_url, role) if role else self.owner_url))
        try:
            yield connection
        finally:
            await connection.close()

    async def register(self, **changes: str) -> httpx.Response:
        name = f"user-{secrets.token_hex(6)}"
        body = {"username": name, "email": f"{name}@example.com", "password": PASSWORD, **changes}
        return await self.call("POST", "/api/v1/auth/register", json=body)

    async def login(self, username: str, password: str = PASSWORD) -> httpx.Response:
        return await self.call("POST", "/api/v1/auth/login", json={"username": username, "password": password})

    async def user(self, role: str | None = None) -> User:
        """A fresh user, signed in; with a role on the installation if one is named."""
        answer = await self.register()
        assert answer.status_code == 201, answer.text
        made = answer.json()
        if role:
            async with self.connect() as connection:
                await connection.execute("INSERT INTO auth.user_role VALUES ($1, $2)", made["user_id"], role)
        tokens = (await self.login(made["username"])).json()
        return User(
            made["user_id"],
            made["org_id"],
            made["username"],
            made["email"],
            tokens["access_token"],
            tokens["refresh_token"],
        )

    async def key(self, user: User, **body: Any) -> dict[str, Any]:
        """A fresh key of a user."""
        answer = await self.call("POST", "/api/v1/keys", token=user.access_token, json={"name": "test", **body})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made


@asynccontextmanager
async def running(
    owner_url: str, redis_url: str, make_clock: Callable[[], FixedClock] = standing_clock, /, **changes: Any
) -> AsyncIterator[Auth]:
    """The composed application over a migrated database, without background tasks; the clock stands still."""
    clock = make_clock()
    chosen = settings(owner_url, redis_url, **changes)
    registry, readiness = CollectorRegistry(), Readiness()
    async with AsyncExitStack() as stack:
        services = await compose(chosen, stack, readiness, clock=clock, registry=registry)
        app = create_app(chosen, services, readiness, clock, registry)
        http = await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://auth")
        )
        redis = await stack.enter_async_context(Redis.from_url(redis_url, decode_responses=True))
        yield Auth(http, services, chosen, clock, registry, owner_url, redis, app)


class Cable:
    """A TCP line to Valkey that can be cut and mended."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._lines: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        credentials = self._target.netloc.rpartition("@")[0]
        return urlunsplit(self._target._replace(netloc=f"{credentials}@127.0.0.1:{self._port}"))

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for line in list(self._lines):
            line.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._lines |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._lines -= {writer, far_writer}

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await source.read(65_536):
                sink.write(part)
                await sink.drain()
        sink.close()
