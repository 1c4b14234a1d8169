"""Usage events: who asked for what, what served it, how it ended, how long it took; to a bounded Redis stream, out of
the hot path.

`record` appends to a bounded queue and never waits; `run` moves batches into the stream `apikeys.USAGE_STREAM`, one
entry a request with one field `event` (JSON, "v": 1). Auth reads it for the last use of keys. What does not fit or does
not reach Redis is counted and dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import orjson

from shared.apikeys import USAGE_STREAM
from shared.identity import Identity
from shared.limits import Hearer, Link, RedisUnavailable, Waiting, encoded
from shared.telemetry import GatewayMetrics

STREAM_ENTRIES_MAX = 100_000
BATCH_MAX = 200
EVENT_VERSION = 1
PATH_CHARS_MAX = 256
BUILD_CHARS_MAX = 128
ADD = b"*8\r\n" + encoded("XADD", USAGE_STREAM, "MAXLEN", "~", STREAM_ENTRIES_MAX, "*", "event")
BUILD_HEADER = "x-tollgate-build"  # a service names the build that served; the gateway keeps it to itself


class UsageEvent(NamedTuple):
    """What is kept of an exchange until it is written."""

    ended_at: datetime
    duration_s: float
    identity: Identity | None
    request_id: str
    service: str
    route: str
    path: str
    method: str
    status: int
    bytes_in: int
    bytes_out: int
    build: str


class Ended(Protocol):
    """An exchange that has ended: what an event says of it. `build` is empty where no model served."""

    identity: Identity | None
    request_id: str
    service: str
    route: str
    path: str
    method: str
    status: int
    bytes_in: int
    bytes_out: int
    build: str


class UsageEvents:
    """See the module."""

    def __init__(self, link: Link, metrics: GatewayMetrics, *, queue_max: int = 10_000, interval_ms: int = 500) -> None:
        self._link = link
        self._lost = metrics.usage_events_lost
        self._queue: deque[UsageEvent] = deque()
        self._queue_max = queue_max
        self._interval_s = interval_ms / 1000

    def record(self, exchange: Ended, ended_at: datetime, duration_s: float) -> None:
        """Note an exchange that has ended; never waits."""
        if len(self._queue) >= self._queue_max:
            self._lost.inc()
            return
        event = UsageEvent(
            ended_at,
            duration_s,
            exchange.identity,
            exchange.request_id,
            exchange.service,
            exchange.route,
            exchange.path[:PATH_CHARS_MAX],
            exchange.method,
            exchange.status,
            exchange.bytes_in,
            exchange.bytes_out,
            exchange.build[:BUILD_CHARS_MAX],
        )
        self._queue.append(event)

    async def run(self) -> None:
        """Move events to the stream until cancelled, then what is left."""
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                while self._queue:
                    await self._flush()
        finally:
            while self._queue:
                await self._flush()

    is_gone = False  # a Hearer: of what came of each event

    def hear(self, reply: Any) -> None:
        if isinstance(reply, RedisUnavailable):
            self._lost.inc()

    async def _flush(self) -> None:
        """One batch, until Redis has answered."""
        hearer: Hearer = self
        for left in reversed(range(min(len(self._queue), BATCH_MAX))):
            event = orjson.dumps(_readable(self._queue.popleft()))
            waiting = None if left else Waiting()
            try:
                self._link.ask(USAGE_STREAM, b"%b$%d\r\n%b\r\n" % (ADD, len(event), event), waiting or hearer)
            except RedisUnavailable:
                self._lost.inc()
            else:
                if waiting is not None:
                    self.hear((await asyncio.gather(waiting.future, return_exceptions=True))[0])


def _readable(event: UsageEvent) -> dict[str, Any]:
    identity = event.identity
    return {
        "v": EVENT_VERSION,
        "at": event.ended_at,
        "request_id": event.request_id,
        "kind": identity.kind if identity else "refused",
        "org_id": identity.org_id if identity else "",
        "user_id": identity.user_id if identity else "",
        "key_id": identity.key_id if identity else "",
        "service": event.service,
        "route": event.route,
        "path": event.path,
        "method": event.method,
        "status": event.status,
        "duration_ms": round(event.duration_s * 1000, 3),
        "bytes_in": event.bytes_in,
        "bytes_out": event.bytes_out,
        "build": event.build,
    }
