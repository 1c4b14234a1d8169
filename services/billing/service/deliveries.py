"""Delivers the outbox: signed, again after longer and longer pauses, a bounded number of times.

An attempt is written down before it is made and leased for its time: a process that dies in the middle has made one
attempt, and another one goes on. So a message arrives at least once, with the same `webhook-id` each time.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from services.billing.repository import webhooks as repository
from services.billing.repository.database import Database
from services.billing.repository.webhooks import Leased
from services.billing.webhooks.sender import Outcome, WebhookSender
from services.billing.webhooks.signature import SecretName, SecretRing
from shared.ids import uuid7
from shared.telemetry import BillingMetrics, get_logger

log = get_logger(__name__)

GONE = "The receiver answered 410 Gone."
FORGOTTEN_AT_ONCE = 1_000
FORGET_INTERVAL_S = 3_600.0


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    """`retries_s`: the pauses between attempts; when they are used up the delivery has failed."""

    retries_s: tuple[float, ...]
    in_flight_max: int
    per_endpoint_max: int
    timeout_s: float
    interval_s: float
    kept_s: float


class Deliveries:
    """One for the life of the process; any number of processes share the work."""

    def __init__(
        self,
        database: Database,
        sender: WebhookSender,
        ring: SecretRing,
        limits: DeliveryLimits,
        metrics: BillingMetrics,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._sender = sender
        self._ring = ring
        self._limits = limits
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver for ever what is due."""
        limits, forgotten_s = self._limits, float("-inf")
        try:
            while True:
                if time.monotonic() - forgotten_s > FORGET_INTERVAL_S:
                    forgotten_s = time.monotonic()
                    await self._forget()
                room = limits.in_flight_max - len(self._under_way)
                lease_s = 2 * limits.timeout_s
                for leased in await repository.lease(self._database, lease_s, limits.per_endpoint_max, room):
                    task = asyncio.create_task(self._attempt(leased))
                    self._under_way.add(task)
                    task.add_done_callback(self._under_way.discard)
                if len(self._under_way) < limits.in_flight_max:
                    await asyncio.sleep(limits.interval_s)
                else:
                    await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _forget(self) -> None:
        before = uuid7(int((time.time() - self._limits.kept_s) * 1_000))
        while await repository.forget(self._database, before, FORGOTTEN_AT_ONCE) == FORGOTTEN_AT_ONCE:
            continue

    async def _attempt(self, leased: Leased) -> None:
        versions = [leased.secret_version, *([leased.secret_version - 1] if leased.signs_before else [])]
        try:
            names = [SecretName(leased.endpoint_id, leased.secret_kid, version) for version in versions]
            secrets = [self._ring.secret(name) for name in names]
        except KeyError:
            outcome = Outcome(None, "its key is gone: rotate the secret")
        else:
            outcome = await self._sender.send(leased.url, secrets, f"msg_{leased.event_id.hex}", leased.body)
        status, retry_in_s = self._verdict(leased.attempts, outcome)
        await repository.record(
            self._database,
            leased,
            status=status,
            retry_in_s=retry_in_s,
            response_status=outcome.status,
            error=outcome.error,
        )
        self._metrics.webhooks.labels(status).inc()
        if outcome.is_gone:
            await repository.disable(self._database, leased.endpoint_id, GONE)
        if status == "failed":
            log.warning("webhook_given_up", endpoint_id=str(leased.endpoint_id), event_id=str(leased.event_id))

    def _verdict(self, attempts: int, outcome: Outcome) -> tuple[str, float]:
        """What becomes of the delivery, and in how many seconds it is due again."""
        if outcome.is_success:
            return "delivered", 0.0
        if outcome.is_gone or attempts > len(self._limits.retries_s):
            return "failed", 0.0
        pause_s = self._limits.retries_s[attempts - 1] * random.uniform(1, 1.2)  # noqa: S311 - spreads retries
        return "pending", max(pause_s, outcome.retry_after_s or 0.0)
