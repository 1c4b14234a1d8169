"""What can stop a relayed request from outside: the client hangs up, or a time limit passes.

A watch belongs to one task. It has one timer that is re-armed only when it fires, so progress costs an assignment;
and, LISTEN_AFTER_S after the request body is in, one task that waits for the client to hang up: a response that is
quicker needs none. Either cancels the task that relays, which surfaces in its `with` block as `Stopped`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from services.gateway.exchange import Exchange

LISTEN_AFTER_S = 0.005


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`first_byte_s`: from the complete request to the head of the response. `idle_s`: between two pieces of either
    body, also while the client does not read. `total_s`: the whole exchange."""

    first_byte_s: float
    idle_s: float
    total_s: float


class Stopped(Exception):
    """The watch ended the block. `reason`: gone, first_byte, idle or total."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """See the module; use it as a context manager inside the task that relays."""

    def __init__(self, exchange: Exchange, timeouts: Timeouts) -> None:
        self._exchange = exchange
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._reason = ""
        self._listener: asyncio.Task[None] | None = None
        self._listening: asyncio.TimerHandle | None = None
        self._began_s = self._last_s = self._loop.time()
        self._waiting_for = "idle"
        self._limit_s = timeouts.idle_s

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = self._loop.call_later(min(self._limit_s, self._timeouts.total_s), self._tick)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._listening is not None:
            self._listening.cancel()
        if self._listener is not None:
            self._listener.cancel()
        reason, self._reason = self._reason, self._reason or "closed"
        if reason and isinstance(error, asyncio.CancelledError) and self._task.uncancel() == 0:
            raise Stopped(reason) from None

    def body_complete(self) -> None:
        """The request is in: from now on the client is listened to, and the service owes a first byte."""
        if self._reason:  # the service answered without waiting for the rest, and all is over
            return
        if not self._exchange.status:
            self._set_limit("first_byte", self._timeouts.first_byte_s)
        self._listening = self._loop.call_later(LISTEN_AFTER_S, self._start_listening)

    def first_byte(self) -> None:
        """The response has begun."""
        self._set_limit("idle", self._timeouts.idle_s)

    def progress(self) -> None:
        """A piece went through."""
        self._last_s = self._loop.time()

    def _set_limit(self, waiting_for: str, limit_s: float) -> None:
        self._last_s = self._loop.time()
        self._waiting_for, self._limit_s = waiting_for, limit_s
        if self._last_s + limit_s < self._timer.when():
            self._timer.cancel()
            self._timer = self._loop.call_later(limit_s, self._tick)

    def _start_listening(self) -> None:
        self._listener = self._loop.create_task(self._listen())

    async def _listen(self) -> None:
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        if not self._exchange.complete:
            self._stop("gone")

    def _tick(self) -> None:
        now_s = self._loop.time()
        due_s = self._last_s + self._limit_s
        end_s = self._began_s + self._timeouts.total_s
        if now_s >= end_s:
            self._stop("total")
        elif now_s >= due_s:
            self._stop(self._waiting_for)
        else:
            self._timer = self._loop.call_at(min(due_s, end_s), self._tick)

    def _stop(self, reason: str) -> None:
        if not self._reason:
            self._reason = reason
            self._task.cancel()
