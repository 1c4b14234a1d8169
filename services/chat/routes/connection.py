"""A client that leaves: ASGI tells it through `receive`, and nothing is cancelled by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive


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
