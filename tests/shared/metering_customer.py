"""A customer with a wallet of their own, behind them the real billing service and a gate: `billing`, `customer`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter

from services.billing.domain import WalletView
from shared.grpc import Caller
from shared.identity import Identity
from shared.metering import Hold, Metering, MeteringLimits
from tests.billing.gate import Gate, gate_to
from tests.billing.harness import MODEL, App, Ledger, caller, ledger_on, migrate, person, running, wait_until
from tests.conftest import FreshDatabase

LIMITS = MeteringLimits(
    hold_ttl_ms=60_000,
    call_timeout_s=20,
    hold_timeout_s=60,
    settle_wait_s=60,
    resolution_timeout_s=60,
    backoff_max_s=0.2,
)


@dataclass
class Billing:
    """The service behind a gate, and its ledger."""

    app: App
    ledger: Ledger
    gate: Gate

    async def heartbeats(self) -> int:
        """How many have arrived, whatever became of them."""
        lines = (await self.app.http.get("/metrics")).text.splitlines()
        counts = [line for line in lines if line.startswith('tollgate_billing_operations_total{kind="heartbeat"')]
        return sum(int(float(line.rpartition(" ")[2])) for line in counts)

    async def has_failed(self, kind: str) -> bool:
        """Whether an operation of this kind met a fault, in whichever process leads its wallet."""
        here = self.ledger.metrics.operations.labels(kind, "internal_error")._value.get()
        line = f'tollgate_billing_operations_total{{kind="{kind}",result="internal_error"}}'
        return here > 0 or line in (await self.app.http.get("/metrics")).text


@pytest.fixture(scope="module")
def owner_url(fresh_database: FreshDatabase) -> str:
    return fresh_database("billing", migrate=migrate)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def billing(owner_url: str) -> AsyncIterator[Billing]:
    async with AsyncExitStack() as stack:
        ledger = await stack.enter_async_context(ledger_on(owner_url))
        app = await stack.enter_async_context(running(owner_url))
        gate = await stack.enter_async_context(gate_to(*address(app.grpc_target)))
        yield Billing(app, ledger, gate)


def address(target: str) -> tuple[str, int]:
    host, _, port = target.partition(":")
    return host, int(port)


@dataclass
class Customer:
    """Somebody with a wallet of their own, and a metering client for them."""

    billing: Billing
    chat: Caller
    org_id: UUID
    identity: Identity
    metering: Metering
    failures: Counter

    def client(self, **limits: Any) -> Metering:
        """Another one, with these limits."""
        return Metering(self.chat, limits=replace(LIMITS, **limits), failures=self.failures)

    def hold(self, max_output_tokens: int = 100, *, metering: Metering | None = None, clamp: bool = False) -> Hold:
        return (metering or self.metering).hold(
            self.identity, model=MODEL, input_tokens=3, max_output_tokens=max_output_tokens, clamp=clamp
        )

    async def wallet(self) -> WalletView:
        return await self.billing.ledger.wallet(self.org_id)

    async def spent(self) -> int:
        wallet = await self.wallet()
        assert wallet.held == 0
        return wallet.spent

    async def finish_reason(self) -> str | None:
        reason: str | None = await self.billing.ledger.pool.fetchval(
            "SELECT finish_reason FROM billing.usage WHERE wallet_id = $1", self.org_id
        )
        return reason

    async def reported(self, output_tokens: int) -> bool:
        """Whether this is what the last heartbeat said."""
        found: int | None = await self.billing.ledger.pool.fetchval(
            "SELECT output_tokens FROM billing.open_hold WHERE wallet_id = $1", self.org_id
        )
        return found == output_tokens

    async def ends_at(self) -> datetime:
        """When the wallet's one open hold would expire."""
        found: datetime = await self.billing.ledger.pool.fetchval(
            "SELECT expires_at FROM billing.open_hold WHERE wallet_id = $1", self.org_id
        )
        return found

    def failed(self) -> int:
        return int(self.failures._value.get())

    async def until_spent(self, nano: int) -> None:
        async def reached() -> bool:
            wallet = await self.wallet()
            return (wallet.held, wallet.spent) == (0, nano)

        await wait_until(reached, f"{nano} spent and nothing held")


@pytest_asyncio.fixture(loop_scope="session")
async def customer(billing: Billing) -> AsyncIterator[Customer]:
    billing.gate.open()
    chat = caller(f"127.0.0.1:{billing.gate.port}")
    org_id = uuid4()
    failures = Counter("failures", "Given up.", registry=CollectorRegistry())
    metering = Metering(chat, limits=LIMITS, failures=failures)
    yield Customer(billing, chat, org_id, person(org_id), metering, failures)
    billing.gate.open()
    await metering.close(timeout_s=60)
    await chat.close()
    await billing.ledger.verified()
