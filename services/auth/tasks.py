"""What runs beside the requests: delivery of key changes that Redis missed, and removal of sessions that are over."""

from __future__ import annotations

import asyncio

from services.auth.errors import KeyChannelDown
from services.auth.service.outbox import Outbox
from services.auth.service.sessions import Sessions
from shared.telemetry import get_logger

log = get_logger(__name__)


async def deliver_outbox(outbox: Outbox, interval_ms: int) -> None:
    """Deliver what is pending, batch after batch, then look again every `interval_ms`."""
    down = False
    while True:
        try:
            more = await outbox.deliver_pending()
        except KeyChannelDown as e:
            more = False
            if not down:  # once per outage, not twice a second
                log.warning("outbox_waits_for_redis", reason=e.detail)
            down = True
        else:
            down = False
        if not more:
            await asyncio.sleep(interval_ms / 1000)


async def prune_sessions(sessions: Sessions, interval_s: int) -> None:
    """Delete what is over, batch after batch, then look again every `interval_s`."""
    while True:
        if not await sessions.prune():
            await asyncio.sleep(interval_s)
