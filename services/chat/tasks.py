"""What runs beside the requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from services.chat.clients import CatalogueClient
from shared.errors import TollgateError
from shared.telemetry import get_logger

log = get_logger(__name__)

PURGE_BATCH = 1_000
Purge = Callable[[int], Awaitable[int]]


async def keep_catalogue(catalogue: CatalogueClient, pause_s: float, loading_pause_s: float) -> None:
    """Refresh the catalogue for ever, oftener while a build is not ready, is in doubt, or nothing is known.

    An inference service that is away changes nothing; it is logged once.
    """
    was_up = True
    while True:
        try:
            await catalogue.refresh()
        except TollgateError as e:
            if was_up:
                log.warning("catalogue_not_refreshed", code=e.code, detail=e.detail)
            was_up = False
        else:
            was_up = True
        await asyncio.sleep(min(pause_s, loading_pause_s))
        if catalogue.is_settled:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(catalogue.doubted(), pause_s - loading_pause_s)


async def keep_purging(purges: Sequence[Purge], pause_s: float) -> None:
    """Delete for ever what has expired, in batches; a full batch is followed by the next at once."""
    while True:
        for purge in purges:
            try:
                while await purge(PURGE_BATCH) == PURGE_BATCH:
                    continue
            except TollgateError as e:
                log.warning("not_purged", code=e.code, detail=e.detail)
        await asyncio.sleep(pause_s)
