"""A client that leaves, or that does not read.

ASGI tells the one through `receive`, and the other by a `send` that does not return. Nothing is cancelled by itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Send

LOOKS = 4  # at a send, in the time that it may take


class SendLimit:
    """A limit on each send of a response, kept by one timer: a time limit around every send would cost as much as the
    send. Leaving the block raises TimeoutError when a send took longer than `timeout_s`, by a quarter at most.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._limit = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._since_s = math.inf

    async def __aenter__(self) -> Send:
        await self._limit.__aenter__()
        self._look_again()
        return self._sending

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(exc_type, exc, traceback)

    async def _sending(self, message: Message) -> None:
        self._since_s = self._loop.time()
        await self._send(message)
        self._since_s = math.inf

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / LOOKS, self._look)

    def _look(self) -> None:
        now_s = self._loop.time()
        if now_s - self._since_s >= self._timeout_s:
            self._limit.reschedule(now_s)
        else:
            self._look_again()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it, and wait until it has ended, as soon as the client has gone.

    The request's body must have been read. Raises what `work` raises, or ClientDisconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait((working, watching))
    if not working.cancelled() and working.exception() is None:
        return None  # it was just done
    raise ClientDisconnect


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
