"""The only client of the ledger: hold credits, do the work, settle what was used, whatever happens to the request.

    async with metering.hold(identity, model="chat-mini", input_tokens=31, max_output_tokens=256, clamp=True) as hold:
        async for chunk in generate(max_tokens=hold.output_tokens):
            hold.record(Usage(input_tokens=31, output_tokens=chunk.completion_tokens))  # cumulative, cheap
            ...
        receipt = await hold.settle(build="chat-mini-q8_0", finish_reason="stop")

How a hold ends:
- `settle` posts the usage and releases the rest. It waits at most `settle_wait_s` for the ledger; when that is away, or
  fails in any way that is not a refusal, it returns None and goes on trying in the background for
  `resolution_timeout_s`, with the same id, so nothing is taken twice.
- A block that is left without `settle` (exception, cancellation, return) settles what was recorded if any output
  token was, with finish_reason `cancelled` or `error`; otherwise it voids the hold. Cancellation does not reach the
  resolution: that runs in a task of its own, and `Metering.close` waits for it.
- Meanwhile heartbeats, soon after the first output token and every third of the hold's life, extend it and store the
  usage so far. When this process dies, or the ledger stays away too long, billing's sweeper settles that usage once the
  hold has expired; a settlement that comes later still posts only the remainder.

Raises from entering: PaymentRequired (`insufficient_quota`, `credits_reserved`), NotFound (`model_not_priced`),
PermissionDenied (`wallet_frozen`), Conflict, Unprocessable (`idempotency_mismatch`), InvalidRequest, Unavailable.
Nothing after that raises but cancellation: an answer that the client has already read does not fail over its bill.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from uuid import UUID

import structlog
from prometheus_client import Counter

from shared.errors import InvalidRequest, TollgateError, Unavailable
from shared.grpc import Caller
from shared.identity import Identity
from shared.ids import uuid7
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub
from shared.telemetry import get_logger

log = get_logger(__name__)

HEARTBEATS_PER_LIFE = 3
# The ledger's decisions, which stand. Anything else (a full disk, a rotation of keys) is a fault, and passes.
REFUSAL_STATUSES = frozenset({400, 402, 403, 404, 409, 422})


@dataclass(frozen=True, slots=True)
class MeteringLimits:
    """Every wait of the client. Times in the unit of their name."""

    hold_ttl_ms: int = 30_000
    first_heartbeat_ms: int = 1_000
    hold_life_max_s: float = 3_600.0
    call_timeout_s: float = 2.0
    hold_timeout_s: float = 4.0
    settle_wait_s: float = 5.0
    resolution_timeout_s: float = 300.0
    resolutions_pending_max: int = 10_000
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request so far. `input_tokens` includes the cached ones."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0

    def at_least(self, other: Usage) -> Usage:
        """The larger of both, class by class: usage never shrinks."""
        return Usage(
            max(self.input_tokens, other.input_tokens),
            max(self.cached_input_tokens, other.cached_input_tokens),
            max(self.output_tokens, other.output_tokens),
        )


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a settlement came to, in nano-credits. `receivable_nano` is what the wallet owes in all."""

    cost_nano: int
    settled_nano: int
    receivable_nano: int
    available_nano: int


@dataclass(frozen=True, slots=True)
class Price:
    """A price in force: nano-credits per request and per million tokens."""

    price_id: str
    model: str
    customer_class: str
    per_request_nano: int
    input_nano_per_million: int
    cached_input_nano_per_million: int
    output_nano_per_million: int


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
        reply = await self.call(self._stub.ListPrices, request)
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
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    @property
    def pending(self) -> int:
        """Resolutions and heartbeats under way."""
        return len(self._tasks)

    async def call(self, method: Any, request: Any) -> Any:
        return await self._caller.call(method, request, timeout_s=self.limits.call_timeout_s)

    async def place(self, request: pb.HoldRequest) -> pb.HoldReply:
        """Ask for a hold, again with the same id until the ledger decides, for at most `hold_timeout_s`."""
        try:
            reply: pb.HoldReply = await self._until_answered(
                self._stub.Hold, request, time.monotonic() + self.limits.hold_timeout_s
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

    async def beat(self, request: pb.HeartbeatRequest) -> None:
        """One heartbeat; one that fails is followed by the next."""
        try:
            await self.call(self._stub.Heartbeat, request)
        except TollgateError as e:
            log.warning("heartbeat_failed", hold_id=request.hold_id, code=e.code, detail=e.detail)

    async def settle(self, request: pb.SettleRequest) -> Receipt | None:
        reply = await self._resolve(self._stub.Settle, request, request.hold_id)
        if reply is None:
            return None
        return Receipt(reply.cost_nano, reply.settled_nano, reply.receivable_nano, reply.available_nano)

    async def void(self, request: pb.VoidRequest) -> None:
        await self._resolve(self._stub.Void, request, request.hold_id)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any] | None:
        """Run in the background, beyond any cancellation of the request. None when too much is pending already."""
        if len(self._tasks) >= self.limits.resolutions_pending_max:
            work.close()
            return None
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _resolve(self, method: Any, request: Any, hold_id: str) -> Any:
        """Call until it is answered, the time is over, or the ledger refuses. None but for an answer."""
        try:
            return await self._until_answered(method, request, time.monotonic() + self.limits.resolution_timeout_s)
        except TollgateError as e:
            self.given_up(hold_id, e.code)
            return None
        except asyncio.CancelledError:
            self.given_up(hold_id, "closed")
            raise

    async def _until_answered(self, method: Any, request: Any, deadline_s: float) -> Any:
        """Call again until the ledger decides. Raises its refusal, or the last failure once the time is over."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self.call(method, request)
            except TollgateError as e:
                pause_s = self._backoff_s(attempt)
                if e.status in REFUSAL_STATUSES or time.monotonic() + pause_s > deadline_s:
                    raise
            await asyncio.sleep(pause_s)

    async def _forget(self, request: pb.HoldRequest) -> None:
        """Void a hold that may or may not have been placed. Its expiry releases it if this fails."""
        try:
            await self.call(
                self._stub.Void, pb.VoidRequest(hold_id=request.hold_id, org_id=request.org_id, reason="abandoned")
            )
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


class Hold:
    """Credits reserved for one request; made by `Metering.hold`.

    After entering: `output_tokens` that the hold covers, `amount_nano`, `price_id`. `build` may be set as soon as it
    is known, so that a request which fails is recorded with it.
    """

    def __init__(self, metering: Metering, hold_id: UUID, request: pb.HoldRequest) -> None:
        self.id = hold_id
        self.build = ""
        self.output_tokens = 0
        self.amount_nano = 0
        self.price_id = ""
        self.usage = Usage()
        self._metering = metering
        self._request = request
        self._started_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._resolution: asyncio.Task[Any] | None = None
        self._is_resolved = False

    async def __aenter__(self) -> Hold:
        reply = await self._metering.place(self._request)
        self._started_s = time.monotonic()
        self.output_tokens = reply.output_tokens
        self.amount_nano = reply.amount_nano
        self.price_id = reply.price_id
        self._schedule_beat(self._beat_interval_s)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_resolved:
            return
        failed = exc is not None and not isinstance(exc, asyncio.CancelledError | GeneratorExit)
        reason = "error" if failed else "cancelled"
        if self.usage.output_tokens > 0:
            await self.settle(build=self.build, finish_reason=reason)
        else:
            await self.void(reason)

    def record(self, usage: Usage) -> None:
        """Remember the cumulative usage so far; the next heartbeat carries it. Never goes down."""
        is_first_output = self.usage.output_tokens == 0 < usage.output_tokens
        self.usage = self.usage.at_least(usage)
        if is_first_output and self._timer is not None and not self._is_resolved:
            left_s = self._timer.when() - asyncio.get_running_loop().time()
            self._schedule_beat(min(left_s, self._metering.limits.first_heartbeat_ms / 1000))

    async def settle(
        self, *, build: str, finish_reason: str, usage: Usage | None = None, duration_ms: int | None = None
    ) -> Receipt | None:
        """Post the usage (the recorded one, or more) and release the rest of the hold.

        None when the ledger has not answered within `settle_wait_s`, or refused: see the module's docstring. The first
        resolution of a hold stands; a second call waits for it. `duration_ms` is the hold's own age when not given.
        """
        if usage is not None:
            self.record(usage)
        self.build = build
        if not self._is_resolved:
            elapsed_ms = int((time.monotonic() - self._started_s) * 1000)
            request = pb.SettleRequest(
                hold_id=str(self.id),
                org_id=self._request.org_id,
                usage=_message(self.usage),
                build=build,
                finish_reason=finish_reason,
                duration_ms=elapsed_ms if duration_ms is None else duration_ms,
            )
            self._begin(self._metering.settle(request))
        receipt = await self._outcome()
        assert isinstance(receipt, Receipt | None)
        return receipt

    async def void(self, reason: str) -> None:
        """Release everything: nothing was produced. The first resolution of a hold stands."""
        if not self._is_resolved:
            request = pb.VoidRequest(hold_id=str(self.id), org_id=self._request.org_id, reason=reason)
            self._begin(self._metering.void(request))
        await self._outcome()

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        self._is_resolved = True
        if self._timer is not None:
            self._timer.cancel()
        self._resolution = self._metering.start(work)
        if self._resolution is None:
            self._metering.given_up(str(self.id), "too_many_pending")

    async def _outcome(self) -> Any:
        """The resolution's result once it is there, None if it takes longer than `settle_wait_s`."""
        if self._resolution is None:
            return None
        done, _ = await asyncio.wait({self._resolution}, timeout=self._metering.limits.settle_wait_s)
        if not done or self._resolution.cancelled():
            return None
        return self._resolution.result()

    @property
    def _beat_interval_s(self) -> float:
        return self._request.ttl_ms / 1000 / HEARTBEATS_PER_LIFE

    def _schedule_beat(self, wait_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._beat)

    def _beat(self) -> None:
        if time.monotonic() - self._started_s > self._metering.limits.hold_life_max_s:
            log.error("hold_too_old", hold_id=str(self.id))
            return  # whoever holds this has forgotten it; it expires
        request = pb.HeartbeatRequest(
            hold_id=str(self.id),
            org_id=self._request.org_id,
            usage=_message(self.usage),
            ttl_ms=self._request.ttl_ms,
        )
        self._metering.start(self._metering.beat(request))
        self._schedule_beat(self._beat_interval_s)


def _message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
    )
