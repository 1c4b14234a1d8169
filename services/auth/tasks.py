"""What runs beside the requests: delivery of key changes that Redis missed, the use of keys, the signing keys,
and removal of what is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from services.auth.errors import RedisDown, SigningKeyUnreadable
from services.auth.service.email import Email
from services.auth.service.key_usage import KeyUsage
from services.auth.service.outbox import Outbox
from services.auth.service.signing import SigningKeys
from shared.telemetry import get_logger

log = get_logger(__name__)


async def deliver_outbox(outbox: Outbox, interval_ms: int) -> None:
    """Deliver what is pending, then look again every `interval_ms`."""
    await _over_redis("outbox", outbox.deliver_pending, interval_ms)


async def note_key_usage(key_usage: KeyUsage, interval_ms: int) -> None:
    """Take what gateways noted, then look again every `interval_ms`."""
    await _over_redis("key_usage", key_usage.note_batch, interval_ms)


async def send_emails(email: Email, interval_ms: int) -> None:
    """Carry out what is due, then look again every `interval_ms`."""
    while True:
        if not await email.send_due():
            await asyncio.sleep(interval_ms / 1000)


async def keep_signing_keys(keys: SigningKeys, interval_s: float) -> None:
    """Read the keys again every `interval_s`. While that fails, those that are known go on signing."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await keys.refresh()
        except (SigningKeyUnreadable, SQLAlchemyError, OSError, TimeoutError) as e:
            log.warning("signing_keys_not_refreshed", reason=type(e).__name__)


async def prune(prune_batch: Callable[[], Awaitable[bool]], interval_s: int) -> None:
    """Delete what is over, batch after batch, then look again every `interval_s`."""
    while True:
        if not await prune_batch():
            await asyncio.sleep(interval_s)


async def _over_redis(task: str, take_batch: Callable[[], Awaitable[bool]], interval_ms: int) -> None:
    """Batch after batch while there may be more. An outage of Redis is logged once, not at every attempt."""
    down = False
    while True:
        try:
            more = await take_batch()
        except RedisDown as e:
            more = False
            if not down:
                log.warning("task_waits_for_redis", task=task, reason=e.detail)
            down = True
        else:
            down = False
        if not more:
            await asyncio.sleep(interval_ms / 1000)
