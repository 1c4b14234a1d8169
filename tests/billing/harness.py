"""Billing's application in this process over real PostgreSQL, and what tests do with it."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from deploy.local.ports import pick_port
from services.billing.app import build
from services.billing.cli import migrate_urls
from services.billing.clients import GrpcPeers
from services.billing.domain import DEFAULT_CLASS, PriceTerms, Usage, WalletView
from services.billing.ledger.operations import GrantCredits, Heartbeat, Operation, PlaceHold, Settle
from services.billing.ledger.results import Held, Result
from services.billing.ledger.shards import ShardLimits, Shards
from services.billing.ledger.writer import ShardWriter, WriterLimits
from services.billing.repository import history, leadership
from services.billing.repository.database import Database, DatabaseLimits
from services.billing.repository.leadership import shard_of
from services.billing.repository.verification import Report, verify
from services.billing.service import Prices
from services.billing.servicer import Servicer
from services.billing.settings import BillingSettings
from services.billing.tasks import Sweeper
from shared.clock import SystemClock
from shared.database import dsn
from shared.grpc import Caller, create_server
from shared.identity import HEADER, Identity, IdentityRing
from shared.ids import uuid7
from shared.rpc.billing_pb2_grpc import add_LedgerServicer_to_server
from shared.telemetry import BillingMetrics, GrpcMetrics
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
DEADLINE_S = 60.0
SHARDS = 2


def migrate(owner_url: str) -> None:
    """Billing's schema and role."""
    migrate_urls(owner_url, role_url(owner_url, ROLE))


@dataclass
class Ledger:
    """One process's part of the ledger on its own pool, with the price of TERMS published."""

    url: str
    owner_url: str
    database: Database
    writer: Shards
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

    @asynccontextmanager
    async def stalled(self, org_id: UUID) -> AsyncIterator[None]:
        """Nobody's transaction for this wallet's shard gets past its first look. Neither could a new leader begin."""
        await has_its_share(self.writer, self.owner_url)
        async with self.pool.acquire() as connection, connection.transaction():
            shard = shard_of(org_id, SHARDS)
            await connection.execute("SELECT FROM billing.shard WHERE id = $1 FOR UPDATE", shard)
            yield

    async def is_waited_for(self) -> bool:
        """Whether a writer's transaction waits at what is `stalled`; a new leader that waits there does not count."""
        waiting: int = await self.pool.fetchval(
            """SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
            AND application_name = 'tollgate-billing-writer' AND query NOT LIKE '%SET epoch%'"""
        )
        return waiting > 0

    async def expire_now(self, hold_id: UUID) -> None:
        """Move the end of a hold into the past, as if its time had gone by. The version tells the writer to look."""
        await self.pool.execute(
            """WITH hold AS (UPDATE billing.open_hold SET expires_at = clock_timestamp() - interval '1 s'
                WHERE hold_id = $1 RETURNING wallet_id)
            UPDATE billing.wallet SET version = version + 1 WHERE id = (SELECT wallet_id FROM hold)""",
            hold_id,
        )

    async def lapse_now(self, grant_id: UUID) -> None:
        """Move the end of a grant into the past, as if its time had gone by: what only the owner can do."""
        connection = await owner(self.owner_url)
        try:
            async with connection.transaction():
                await connection.execute("ALTER TABLE billing.credit_grant DISABLE TRIGGER USER")
                for table in ("credit_grant", "expiring_grant"):
                    ended = f"UPDATE billing.{table} SET expires_at = clock_timestamp() - interval '1 s'"
                    await connection.execute(f"{ended} WHERE account_id = $1", grant_id)
                await connection.execute("ALTER TABLE billing.credit_grant ENABLE TRIGGER USER")
                await connection.execute(
                    """UPDATE billing.wallet SET version = version + 1
                    WHERE id = (SELECT wallet_id FROM billing.credit_grant WHERE account_id = $1)""",
                    grant_id,
                )
        finally:
            await connection.close()


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
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(Database(url, DatabaseLimits(connections_max=8)))
        prices = Prices(database)
        await prices.bring_up_to_date(MODEL, DEFAULT_CLASS, TERMS, "test")
        peers = GrpcPeers(RING, timeout_s=DEADLINE_S)
        stack.push_async_callback(peers.close)
        server = create_server(RING, GrpcMetrics(CollectorRegistry(), "billing"))
        port = server.add_insecure_port("127.0.0.1:0")
        writer = Shards(
            database,
            url,
            peers,
            address=f"127.0.0.1:{port}",
            signup_credits=signup_nano,
            metrics=metrics,
            limits=ShardLimits(shards=SHARDS, balance_interval_s=0.05, lock_interval_s=0.02),
            writer_limits=limits,
        )
        add_LedgerServicer_to_server(Servicer(writer, prices, Readiness()), server)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        await stack.enter_async_context(kept_running(writer.run))
        sweeper = Sweeper(database, EveryShard(writer), metrics, interval_s=0.05, batch_max=100, hold_grace_s=0)
        await has_its_share(writer, owner_url)
        yield Ledger(url, owner_url, database, writer, prices, sweeper, metrics)


@dataclass
class EveryShard:
    """The ledger for a sweeper that sweeps alone, whoever leads."""

    writer: Shards

    @property
    def count(self) -> int:
        return self.writer.count

    @property
    def led(self) -> list[int]:
        return list(range(self.writer.count))

    async def submit(self, operation: Operation) -> Result:
        return await self.writer.submit(operation)


async def has_its_share(writer: Shards, owner_url: str) -> None:
    """Wait until this process counts and the shards are evenly led: none moves in the middle of a test."""
    connection = await asyncpg.connect(dsn(role_url(owner_url, ROLE)))

    async def even() -> bool:
        if not writer._wanted:
            return False
        part = -(-SHARDS // await leadership.members(connection))
        led = Counter((await leadership.leaders(connection)).values())
        taken = await leadership.taken(connection)
        return led.total() == len(taken) == SHARDS and max(led.values()) <= part

    try:
        await wait_until(even, "an even share of the shards")
    finally:
        await connection.close()


@asynccontextmanager
async def session(ledger: Ledger) -> AsyncIterator[Any]:
    """A writer's connection, of whoever."""
    connection = await leadership.connect(ledger.url, timeout_s=10, statement_timeout_ms=30_000)
    try:
        yield connection
    finally:
        connection.terminate()


def writer_beside(ledger: Ledger, shard: int, limits: WriterLimits | None = None) -> ShardWriter:
    """Another one of the shard, with a memory of its own, that leads nothing yet."""
    metrics = BillingMetrics(CollectorRegistry())
    return ShardWriter(shard, signup_credits=0, metrics=metrics, limits=limits or WriterLimits())


async def accepts(writer: ShardWriter) -> bool:
    return writer.accepts


@asynccontextmanager
async def kept_running(run: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """A background task for the time of the block."""
    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@dataclass
class App:
    """The service: its HTTP without a socket, its gRPC on a port of its own."""

    grpc_target: str
    http: httpx.AsyncClient
    tasks: dict[str, Callable[[], Coroutine[Any, Any, None]]]


@asynccontextmanager
async def running(owner_url: str, **changes: Any) -> AsyncIterator[App]:
    """The application as `app.build` makes it; of its background tasks only the ledger runs."""
    values: dict[str, Any] = {
        "identity_keys": SecretStr(IDENTITY_KEYS),
        "billing_database_url": SecretStr(role_url(owner_url, ROLE)),
        "signup_credits": "0.000001",
        "billing_hold_grace_s": 0,
        "billing_shards": SHARDS,
    }
    async with AsyncExitStack() as stack:
        port = pick_port()
        values["billing_grpc_advertise"] = f"127.0.0.1:{port}"
        readiness = Readiness()
        service = await build(BillingSettings(**{**values, **changes}), stack, readiness)
        assert service.grpc is not None
        assert service.grpc.add_insecure_port(f"127.0.0.1:{port}") == port
        await service.grpc.start()
        stack.push_async_callback(service.grpc.stop, 0)
        tasks = dict(service.tasks)
        run: Any = tasks.pop("ledger")
        await stack.enter_async_context(kept_running(run))

        async def leads() -> bool:
            return (await readiness.report())[0]

        await wait_until(leads, "the ledger's start")
        await has_its_share(run.__self__, owner_url)
        transport = httpx.ASGITransport(app=service.http[0].app)
        http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://billing"))
        yield App(f"127.0.0.1:{port}", http, tasks)


class PatientCaller(Caller):
    """On a busy machine a call that is not about time takes what it takes."""

    async def call(self, method: Any, request: Any, *, timeout_s: float = DEADLINE_S) -> Any:
        return await super().call(method, request, timeout_s=timeout_s)


def caller(target: str) -> Caller:
    return PatientCaller(target, RING, service="chat")


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
    owner_url: str,
    http_port: int,
    grpc_port: int,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] = ("services.billing",),
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
        "TOLLGATE_BILLING_SHARDS": str(SHARDS),
        "TOLLGATE_LOG_LEVEL": "ERROR",
        **(settings or {}),
    }
    # Its errors come out with those of a test that fails.
    process = subprocess.Popen([sys.executable, "-m", *program], cwd=ROOT, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
