"""PostgreSQL of the bench's own, with the launcher's settings, and billing's schema and processes on it."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from bench.ledger.spent import Spent, spent
from deploy.local.ports import pick_port
from deploy.local.postgres import SUPERUSER, Postgres
from deploy.local.stack import Stack
from deploy.local.state import Layout
from services.billing.cli import migrate_urls
from services.billing.domain import DEFAULT_CLASS, PriceTerms
from services.billing.repository.database import Database, DatabaseLimits
from services.billing.repository.verification import verify
from services.billing.service import Prices
from shared.clock import SystemClock
from shared.database import dsn
from shared.identity import IdentityRing

ROOT = Path(__file__).resolve().parents[2]
ROLE = "tollgate_billing"
MODEL = "chat-mini"
TERMS = PriceTerms(per_request=0, input=1_000_000, cached_input=1_000_000, output=1_000_000)
IDENTITY_KEYS = f"bench:{base64.b64encode(b'b' * 32).decode()}"
START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Server:
    """A running cluster."""

    postgres: Postgres

    def url(self, role: str = ROLE) -> str:
        """Of billing's database; ROLE is what the service runs as."""
        return self.postgres.url(user=role)

    @property
    def superuser_url(self) -> str:
        return self.postgres.url(user=SUPERUSER)

    def spent(self) -> Spent:
        """What it has used so far."""
        return spent(self.postgres)

    def settle_down(self) -> None:
        """Statistics, visibility and checkpoint as they are in a database that has run for a while."""
        asyncio.run(self._maintain("VACUUM ANALYZE", "CHECKPOINT"))

    def check(self) -> None:
        """Raise AssertionError unless all books add up. A wallet may have grown a thousandfold since the statistics."""
        asyncio.run(self._maintain("ANALYZE"))
        report = asyncio.run(verify(self.url()))
        assert report.is_clean, "\n".join(report.lines())

    async def _maintain(self, *statements: str) -> None:
        """However long it takes: of 10⁷ transfers it takes minutes."""
        connection = await asyncpg.connect(dsn(self.superuser_url))
        try:
            for statement in statements:
                await connection.execute(statement, timeout=None)
        finally:
            await connection.close()

    @contextmanager
    def billing(self) -> Iterator[tuple[str, int]]:
        """`python -m services.billing` on it: its gRPC address and process id."""
        http, grpc = pick_port(), pick_port()
        environment = {
            "PATH": os.defpath,
            "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
            "TOLLGATE_BILLING_DATABASE_URL": self.url(),
            "TOLLGATE_BILLING_HTTP_LISTEN": f"127.0.0.1:{http}",
            "TOLLGATE_BILLING_GRPC_LISTEN": f"127.0.0.1:{grpc}",
            "TOLLGATE_LOG_LEVEL": "ERROR",
        }
        process = subprocess.Popen([sys.executable, "-m", "services.billing"], cwd=ROOT, env=environment)
        try:
            _wait_for(grpc, process)
            yield f"127.0.0.1:{grpc}", process.pid
        finally:
            process.terminate()
            process.wait(timeout=START_TIMEOUT_S)


@contextmanager
def running() -> Iterator[Server]:
    """A fresh cluster with billing's schema and one price; gone at the end."""
    state = Path(tempfile.mkdtemp(prefix="tollgate-bench-"))
    stack = Stack(Layout(ROOT, state / "state"), pick_port(), {})
    try:
        stack.start_data_stores()
        server = Server(stack.postgres)
        migrate_urls(stack.postgres.url(), server.url())
        asyncio.run(_publish_price(server.url()))
        yield server
    finally:
        stack.down()
        shutil.rmtree(state, ignore_errors=True)


def identity_ring() -> IdentityRing:
    return IdentityRing(IDENTITY_KEYS, SystemClock())


async def _publish_price(url: str) -> None:
    async with Database(url, DatabaseLimits(connections_max=2)) as database:
        await Prices(database).bring_up_to_date(MODEL, DEFAULT_CLASS, TERMS, "bench")


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    async def reachable() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            asyncio.run(reachable())
        except OSError:
            assert process.poll() is None, "billing ended; its errors are above"
            assert time.monotonic() < deadline_s, f"billing did not listen within {START_TIMEOUT_S} s"
            time.sleep(0.1)
        else:
            return
