"""Billing's application in this process over real PostgreSQL, and what tests do with it."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from services.billing.app import build
from services.billing.cli import migrate_urls
from services.billing.domain import DEFAULT_CLASS, PriceTerms, Usage, WalletView
from services.billing.ledger.operations import GrantCredits, Heartbeat, PlaceHold, Settle
from services.billing.ledger.results import Held
from services.billing.ledger.writer import Writer, WriterLimits
from services.billing.repository import history
from services.billing.repository.database import Database, DatabaseLimits
from services.billing.repository.verification import Report, verify
from services.billing.service import Prices
from services.billing.settings import BillingSettings
from services.billing.tasks import Sweeper
from shared.clock import SystemClock
from shared.database import dsn
from shared.grpc import Caller
from shared.identity import HEADER, Identity, IdentityRing
from shared.ids import uuid7
from shared.telemetry import BillingMetrics
from shared.web import Readiness
from tests.conftest import role_url

ROOT = Path(__file__).parents[2]
ROLE = "tollgate_billing"
IDENTITY_KEYS = f"test:{base64.b64encode(b'i' * 32).decode()}"
RING = IdentityRing(IDENTITY_KEYS, SystemClock())
MODEL = "chat-mini"
# One nano-credit an output token: amounts read as token counts.
TERMS = PriceTerms(per_request=0, input=0, cached_input=0, output=1_000_000)
SIGNUP_NANO = 1_000
DEADLINE_S = 30.0


def migrate(owner_url: str) -> None:
    """Billing's schema and role."""
    migrate_urls(owner_url, role_url(owner_url, ROLE))


@dataclass
class Ledger:
    """The writer on its own pool, with the price of TERMS published."""

    url: str
    owner_url: str
    database: Database
    writer: Writer
    prices: Prices
    sweeper: Sweeper
    metrics: BillingMetrics

    @property
    def pool(self) -> Any:
        """Plain connections of the service's role."""
        return self.database.pool

    async def wallet(self, org_id: UUID) -> WalletView:
        view = await history.wallet(self.database, org_id)
        assert view is not None
        return view

    async def held(self, org_id: UUID, output_tokens: int, **changes: Any) -> Held:
        result = await self.writer.submit(place(org_id, output_tokens, **changes))
        assert isinstance(result, Held)
        return result

    async def verified(self) -> Report:
        report = await verify(self.url)
        assert report.is_clean, "\n".join(report.lines())
        return report

    async def expire_now(self, hold_id: UUID) -> None:
        """Move the end of a hold into the past, as if its time had gone by."""
        await self.pool.execute(
            "UPDATE billing.open_hold SET expires_at = clock_timestamp() - interval '1 s' WHERE hold_id = $1", hold_id
        )


def place(org_id: UUID, output_tokens: int, **changes: Any) -> PlaceHold:
    values: dict[str, Any] = {
        "wallet_id": org_id,
        "hold_id": uuid7(),
        "user_id": uuid4(),
        "key_id": None,
        "plan": "default",
        "model": MODEL,
        "worst_case": Usage(0, 0, output_tokens),
        "clamp": False,
        "ttl_ms": 60_000,
        "request_id": "req_test",
    }
    return PlaceHold(**{**values, **changes})


def settle(org_id: UUID, hold_id: UUID, output_tokens: int) -> Settle:
    return Settle(org_id, hold_id, Usage(0, 0, output_tokens), "chat-mini-q8_0", "stop", 5)


def heartbeat(org_id: UUID, hold_id: UUID, output_tokens: int, ttl_ms: int = 60_000) -> Heartbeat:
    return Heartbeat(org_id, hold_id, Usage(0, 0, output_tokens), ttl_ms)


def grant(org_id: UUID, amount: int, **changes: Any) -> GrantCredits:
    values: dict[str, Any] = {
        "wallet_id": org_id,
        "account_id": uuid7(),
        "amount": amount,
        "source": "manual",
        "reason": "test",
        "priority": 100,
        "expires_at": None,
        "idempotency_tenant": org_id,
        "idempotency_key": f"key:{uuid4()}",
        "author": "user:test",
    }
    return GrantCredits(**{**values, **changes})


@asynccontextmanager
async def ledger_on(
    owner_url: str, *, url: str | None = None, signup_nano: int = SIGNUP_NANO, limits: WriterLimits | None = None
) -> AsyncIterator[Ledger]:
    """A ledger on a migrated database. `url` is another way to reach it as the service's role."""
    url = url or role_url(owner_url, ROLE)
    metrics = BillingMetrics(CollectorRegistry())
    async with Database(url, DatabaseLimits(connections_max=8)) as database:
        writer = Writer(database, signup_credits=signup_nano, metrics=metrics, limits=limits)
        prices = Prices(database)
        await prices.bring_up_to_date(MODEL, DEFAULT_CLASS, TERMS, "test")
        sweeper = Sweeper(database, writer, metrics, interval_s=0.05, batch_max=100, hold_grace_s=0)
        yield Ledger(url, owner_url, database, writer, prices, sweeper, metrics)
        await writer.close()


@dataclass
class App:
    """The service: its HTTP without a socket, its gRPC on a port of its own."""

    grpc_target: str
    http: httpx.AsyncClient
    tasks: dict[str, Callable[[], Coroutine[Any, Any, None]]]


@asynccontextmanager
async def running(owner_url: str, **changes: Any) -> AsyncIterator[App]:
    """The application as `app.build` makes it; its background tasks are not started."""
    values: dict[str, Any] = {
        "identity_keys": SecretStr(IDENTITY_KEYS),
        "billing_database_url": SecretStr(role_url(owner_url, ROLE)),
        "signup_credits": "0.000001",
        "billing_hold_grace_s": 0,
    }
    async with AsyncExitStack() as stack:
        service = await build(BillingSettings(**{**values, **changes}), stack, Readiness())
        assert service.grpc is not None
        port = service.grpc.add_insecure_port("127.0.0.1:0")
        await service.grpc.start()
        stack.push_async_callback(service.grpc.stop, 0)
        transport = httpx.ASGITransport(app=service.http[0].app)
        http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://billing"))
        yield App(f"127.0.0.1:{port}", http, dict(service.tasks))


def caller(target: str) -> Caller:
    return Caller(target, RING, service="chat")


def person(org_id: UUID | None = None, *, scopes: tuple[str, ...] = ("billing:read",), **changes: Any) -> Identity:
    return Identity(
        kind="key", org_id=str(org_id or uuid4()), user_id=str(uuid4()), key_id=str(uuid4()), scopes=scopes, **changes
    )


def operator() -> Identity:
    return person(scopes=("admin", "*"), roles=("operator",))


def signed(identity: Identity, **headers: str) -> dict[str, str]:
    return {HEADER: RING.sign(identity), **headers}


async def wait_until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not await condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {DEADLINE_S} s"
        await asyncio.sleep(0.02)


async def owner(owner_url: str) -> Any:
    """A connection of the schema's owner; close it."""
    return await asyncpg.connect(dsn(owner_url))


@contextmanager
def service_process(
    owner_url: str, http_port: int, grpc_port: int, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m services.billing`, as the launcher starts it. Killed at the end if it still runs."""
    environment = {
        "PATH": os.defpath,
        "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
        "TOLLGATE_BILLING_DATABASE_URL": role_url(owner_url, ROLE),
        "TOLLGATE_BILLING_HTTP_LISTEN": f"127.0.0.1:{http_port}",
        "TOLLGATE_BILLING_GRPC_LISTEN": f"127.0.0.1:{grpc_port}",
        "TOLLGATE_SIGNUP_CREDITS": "1",
        "TOLLGATE_BILLING_SWEEP_INTERVAL_S": "0.1",
        "TOLLGATE_LOG_LEVEL": "ERROR",
        **(settings or {}),
    }
    # Its errors come out with those of a test that fails.
    process = subprocess.Popen([sys.executable, "-m", "services.billing"], cwd=ROOT, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
