"""One hold: credits reserved for one request, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Protocol
from uuid import UUID

from shared.metering.types import MeteringLimits, Receipt, Usage
from shared.rpc import billing_pb2 as pb
from shared.telemetry import get_logger

log = get_logger(__name__)

HEARTBEATS_PER_LIFE = 3


class Resolver(Protocol):
    """What a hold asks of the client that made it."""

    limits: MeteringLimits

    async def place(self, request: pb.HoldRequest) -> pb.HoldReply: ...

    async def extend(self, request: pb.ExtendRequest) -> pb.ExtendReply: ...

    async def beat(self, request: pb.HeartbeatRequest) -> None: ...

    async def settle(self, request: pb.SettleRequest) -> Receipt | None: ...

    async def void(self, request: pb.VoidRequest) -> None: ...

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any] | None: ...

    def given_up(self, hold_id: str, code: str) -> None: ...


class Hold:
    """Credits reserved for one request; made by `Metering.hold`.

    After entering: `output_tokens` that the hold covers, `amount_nano`, `price_id`. `build` may be set as soon as it
    is known, so that a request which fails is recorded with it.
    """

    def __init__(self, metering: Resolver, hold_id: UUID, request: pb.HoldRequest) -> None:
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
        self._extensions = 0

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

    async def extend(self, output_tokens: int) -> int:
        """Have it cover so many output tokens in all, or as many as there are credits for; what it covers now.

        Raises what placing a hold raises when not one token more can be had, or nobody knows; then it covers what it
        did before, and may be asked again. One call at a time.
        """
        self._extensions += 1
        request = pb.ExtendRequest(
            hold_id=str(self.id),
            org_id=self._request.org_id,
            number=self._extensions,
            output_tokens=output_tokens,
        )
        reply = await self._metering.extend(request)
        self.output_tokens, self.amount_nano = reply.output_tokens, reply.amount_nano
        return self.output_tokens

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
