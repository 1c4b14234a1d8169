"""One read at a time for each name: whoever comes meanwhile shares it, or the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


class Flights(Generic[ResultT]):
    """For each name at most one read that runs, and one that waits for its end."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[ResultT]] = {}
        self._waiting: dict[str, asyncio.Task[ResultT]] = {}

    def running(self, name: str) -> asyncio.Task[ResultT] | None:
        """The read that runs now; it may have seen a state from before this call."""
        return self._running.get(name)

    def begun_from_now_on(self, name: str, read: Callable[[], Awaitable[ResultT]]) -> asyncio.Task[ResultT]:
        """A read that has not begun yet: the one that waits for its turn, else a new one.

        Await it shielded: a caller that leaves must not take the read away from the others.
        """
        flight = self._waiting.get(name)
        if flight is None:
            flight = self._waiting[name] = asyncio.create_task(self._fly(name, read), name="flight")
            flight.add_done_callback(_retrieve)
        return flight

    async def _fly(self, name: str, read: Callable[[], Awaitable[ResultT]]) -> ResultT:
        if (before := self._running.get(name)) is not None:
            await asyncio.wait([before])
        flight = self._running[name] = self._waiting.pop(name)
        try:
            return await read()
        finally:
            if self._running.get(name) is flight:
                del self._running[name]


def _retrieve(flight: asyncio.Task[ResultT]) -> None:
    """Mark a failure as seen, also when every caller has left."""
    if not flight.cancelled():
        flight.exception()
