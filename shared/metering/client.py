"""The client: makes holds, sends what they ask, and asks again until the ledger decides."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import structlog
from prometheus_client import Counter

from shared.errors import InvalidRequest, TollgateError, Unavailable
from shared.grpc import Caller
from shared.identity import Identity
from shared.ids import uuid7
from shared.metering.hold import Hold
from shared.metering.link import Kind, Link
from shared.metering.types import MeteringLimits, Price, Receipt
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from shared.telemetry import get_logger

log = get_logger(__name__)

# The ledger's decisions, which stand. Anything else (a full disk, a rotation of keys) is a fault, and passes.
REFUSAL_STATUSES = frozenset({400, 402, 403, 404, 409, 422})


class Metering:
    """Makes holds. One for the life of a process; close it before its caller.

    `failures` counts resolutions that were given up, or that the ledger refused.
    """

    def __init__(
        self, caller: Caller, *, limits: MeteringLimits | None = None, failures: Counter | None = None
    ) -> None:
        self._caller = caller
        self._stub = LedgerStub(caller.channel)
        self._failures = failures
        self._tasks: set[asyncio.Task[Any]] = set()
        self.limits = limits or MeteringLimits()
        self._link = Link(caller, self.limits)

    def hold(
        self, identity: Identity, *, model: str, input_tokens: int, max_output_tokens: int, clamp: bool = False
    ) -> Hold:
        """Reserve the worst case of a request: an async context manager. The wallet is the one of `identity.org_id`.

        With `clamp` the ledger may cover fewer output tokens (at least one) than were asked for: obey
        `hold.output_tokens`.
        """
        if not identity.org_id:
            raise InvalidRequest("This needs a caller that belongs to an organisation.")
        hold_id = uuid7()
        request = pb.HoldRequest(
            hold_id=str(hold_id),
            org_id=identity.org_id,
            user_id=identity.user_id,
            key_id=identity.key_id,
            plan=identity.plan,
            model=model,
            worst_case=pb.Usage(input_tokens=input_tokens, output_tokens=max_output_tokens),
            clamp=clamp,
            ttl_ms=self.limits.hold_ttl_ms,
            request_id=structlog.contextvars.get_contextvars().get("request_id", ""),
        )
        return Hold(self, hold_id, request)

    async def prices(self, *, org_id: str = "", plan: str = "default") -> list[Price]:
        """The prices in force now for a customer. Raises TollgateError."""
        request = pb.ListPricesRequest(org_id=org_id, plan=plan)
        reply = await self._caller.call(self._stub.ListPrices, request, timeout_s=self.limits.call_timeout_s)
        return [
            Price(
                p.price_id,
                p.model,
                p.customer_class,
                p.per_request_nano,
                p.input_nano_per_million,
                p.cached_input_nano_per_million,
                p.output_nano_per_million,
            )
            for p in reply.prices
        ]

    async def close(self, timeout_s: float = 10.0) -> None:
        """Wait for resolutions under way; what is not done by then is left to billing's sweeper."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._link.close()

    @property
    def pending(self) -> int:
        """Resolutions and heartbeats under way."""
        return len(self._tasks)

    async def place(self, request: pb.HoldRequest) -> pb.HoldReply:
        """Ask for a hold, again with the same id until the ledger decides, for at most `hold_timeout_s`."""
        try:
            reply: pb.HoldReply = await self._until_answered(
                "hold", request, time.monotonic() + self.limits.hold_timeout_s
            )
        except TollgateError as e:
            if e.status in REFUSAL_STATUSES:
                raise
            self.start(self._forget(request))
            raise Unavailable(
                "Billing is not available right now. Retry.", code="billing_unavailable", retry_after_s=1
            ) from e
        except asyncio.CancelledError:
            self.start(self._forget(request))
            raise
        return reply

    async def extend(self, request: pb.ExtendRequest) -> pb.ExtendReply:
        """Ask for more, again with the same number until the ledger decides, for at most `hold_timeout_s`."""
        reply: pb.ExtendReply = await self._until_answered(
            "extend", request, time.monotonic() + self.limits.hold_timeout_s
        )
        return reply

    async def beat(self, request: pb.HeartbeatRequest) -> None:
        """One heartbeat; one that fails is followed by the next."""
        try:
            await self._link.send("heartbeat", request)
        except TollgateError as e:
            log.warning("heartbeat_failed", hold_id=request.hold_id, code=e.code, detail=e.detail)

    async def settle(self, request: pb.SettleRequest) -> Receipt | None:
        reply = await self._resolve("settle", request)
        if reply is None:
            return None
        return Receipt(reply.cost_nano, reply.settled_nano, reply.receivable_nano, reply.available_nano)

    async def void(self, request: pb.VoidRequest) -> None:
        await self._resolve("void", request)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any] | None:
        """Run in the background, beyond any cancellation of the request. None when too much is pending already."""
        if len(self._tasks) >= self.limits.resolutions_pending_max:
            work.close()
            return None
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _resolve(self, kind: Kind, request: Any) -> Any:
        """Call until it is answered, the time is over, or the ledger refuses. None but for an answer."""
        try:
            return await self._until_answered(kind, request, time.monotonic() + self.limits.resolution_timeout_s)
        except TollgateError as e:
            self.given_up(request.hold_id, e.code)
            return None
        except asyncio.CancelledError:
            self.given_up(request.hold_id, "closed")
            raise

    async def _until_answered(self, kind: Kind, request: Any, deadline_s: float) -> Any:
        """Call again until the ledger decides. Raises its refusal, or the last failure once the time is over."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._link.send(kind, request)
            except TollgateError as e:
                pause_s = self._backoff_s(attempt)
                if e.status in REFUSAL_STATUSES or time.monotonic() + pause_s > deadline_s:
                    raise
            await asyncio.sleep(pause_s)

    async def _forget(self, request: pb.HoldRequest) -> None:
        """Void a hold that may or may not have been placed. Its expiry releases it if this fails."""
        try:
            void = pb.VoidRequest(hold_id=request.hold_id, org_id=request.org_id, reason="abandoned")
            await self._link.send("void", void)
        except TollgateError as e:
            log.info("hold_abandoned", hold_id=request.hold_id, code=e.code)

    def _backoff_s(self, attempt: int) -> float:
        ceiling_s = min(self.limits.backoff_max_s, self.limits.backoff_first_s * 2 ** min(attempt - 1, 16))
        return random.uniform(ceiling_s / 2, ceiling_s)  # noqa: S311 - spreads retries, guards nothing

    def given_up(self, hold_id: str, code: str) -> None:
        """Say and count that a hold is left to billing's sweeper."""
        if self._failures is not None:
            self._failures.inc()
        log.error("hold_resolution_failed", hold_id=hold_id, code=code)
