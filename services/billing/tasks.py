"""What runs beside the requests: the sweeper, which ends what nobody ended in time, and the gauges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from services.billing.ledger.operations import ExpireGrant, ExpireHold
from services.billing.ledger.writer import Ledger
from services.billing.repository import due
from services.billing.repository.database import Database
from shared.errors import Conflict, TollgateError
from shared.money import NANO_PER_CREDIT
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)


class ShardedLedger(Ledger, Protocol):
    """The ledger as its sweeper knows it."""

    @property
    def count(self) -> int:
        """How many shards there are in all."""

    @property
    def led(self) -> list[int]:
        """Those that this process leads."""


class Sweeper:
    """Expires holds and grants of the shards led here whose time is over on the database's clock.

    No hold expires until `hold_grace_s` after the first pass, and after the first good pass that follows a failed one:
    while billing or its database was away no heartbeat could arrive, and what looks expired may be a live request.
    """

    def __init__(
        self,
        database: Database,
        ledger: ShardedLedger,
        metrics: BillingMetrics,
        *,
        interval_s: float,
        batch_max: int,
        hold_grace_s: float,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._metrics = metrics
        self._interval_s = interval_s
        self._batch_max = batch_max
        self._hold_grace_s = hold_grace_s
        self._holds_from_s: float | None = None

    async def run(self) -> None:
        """Sweep for ever. A database that is away is tried again by the runtime."""
        while True:
            swept = await self.sweep()
            if swept < self._batch_max:
                await asyncio.sleep(self._interval_s)

    async def sweep(self) -> int:
        """One pass. How many were due and are done. Raises LedgerUnavailable."""
        try:
            return await self._pass()
        except Exception:
            self._holds_from_s = None
            raise

    async def _pass(self) -> int:
        holds = await due.expired_holds(self._database, self._batch_max, self._ledger.count, self._ledger.led)
        if self._holds_from_s is None:
            self._holds_from_s = time.monotonic() + self._hold_grace_s
        if time.monotonic() < self._holds_from_s:
            holds = []
        expired = await self._expire(ExpireHold(wallet_id, hold_id) for wallet_id, hold_id in holds)
        self._metrics.holds_expired.inc(expired)
        grants = await due.expired_grants(self._database, self._batch_max, self._ledger.count, self._ledger.led)
        return expired + await self._expire(ExpireGrant(wallet_id, account_id) for wallet_id, account_id in grants)

    async def _expire(self, operations: Iterable[ExpireHold | ExpireGrant]) -> int:
        """All at once: they go together in few transactions."""
        due_now = list(operations)
        outcomes = await asyncio.gather(*(self._ledger.submit(o) for o in due_now), return_exceptions=True)
        done = 0
        for operation, outcome in zip(due_now, outcomes, strict=True):
            if isinstance(outcome, Conflict):
                continue  # a settlement or a heartbeat was first
            if isinstance(outcome, TollgateError):
                log.error("expiry_failed", key=operation.key, code=outcome.code, detail=outcome.detail)
                await self._database.ping()  # one wallet's trouble does not end the pass; the database's does
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                log.info("expired", key=operation.key, wallet_id=str(operation.wallet_id))
                done += 1
        return done


class Gauges:
    """Keeps the figures that are sums over the whole database."""

    def __init__(self, database: Database, metrics: BillingMetrics, *, interval_s: float) -> None:
        self._database = database
        self._metrics = metrics
        self._interval_s = interval_s

    async def run(self) -> None:
        while True:
            totals = await due.totals(self._database)
            self._metrics.open_holds.set(totals.open_holds)
            self._metrics.credits_held.set(totals.held / NANO_PER_CREDIT)
            self._metrics.wallets_frozen.set(totals.frozen_wallets)
            await asyncio.sleep(self._interval_s)
