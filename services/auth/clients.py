"""Redis: where gateways look keys up, hear of changes, and leave word of what was used.

Per change, in this order: the version of the key or session goes up (never down, so that a late delivery does no
harm); of a key, the cached record goes, and every gateway hears the digest. From the first of the three on, no
admission finds the version that it wants, and asks PostgreSQL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from services.auth.domain import Event, KeyEvent
from services.auth.errors import RedisDown
from shared import access_tokens, apikeys

_RAISE_VERSION = """
local held = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
if tonumber(ARGV[1]) > held then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
end
return 1
"""


class ChangeChannel:
    """Tells gateways about changed keys and sessions."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def announce(self, events: Sequence[Event]) -> None:
        """Deliver changes; saying one twice does no harm. Raises RedisDown when not all of them arrived."""
        pipeline = self._redis.pipeline(transaction=False)
        for event in events:
            pipeline.eval(_RAISE_VERSION, 1, _version_name(event), str(event.version), str(apikeys.CACHE_TTL_S))
            if isinstance(event, KeyEvent):
                pipeline.delete(apikeys.record_name(event.digest))
                pipeline.publish(apikeys.CHANNEL, event.digest)
        try:
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as e:
            raise RedisDown(detail=type(e).__name__) from e

    async def server(self) -> str:
        """Which server answers: another one after a failover or a restart. Raises RedisDown."""
        try:
            found: dict[str, Any] = await self._redis.info("server")
        except (RedisError, OSError, TimeoutError) as e:
            raise RedisDown(detail=type(e).__name__) from e
        return str(found.get("run_id", ""))


class UsageStream:
    """The gateways' stream of usage events, shared out among auth's replicas. A batch that is lost with its reader
    stays lost: all that is made of it is the last use of keys, and the next use mends that.
    """

    GROUP = "auth"

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def read(self, batch_max: int) -> tuple[int, dict[UUID, datetime]]:
        """How many events came (at most `batch_max`), and when each key among them was last used. Raises RedisDown."""
        try:
            reply: Any = await self._redis.xreadgroup(
                self.GROUP, self.GROUP, {apikeys.USAGE_STREAM: ">"}, count=batch_max, noack=True
            )
        except ResponseError as e:
            if not str(e).startswith("NOGROUP"):
                raise RedisDown(detail=type(e).__name__) from e
            return await self._join()
        except (RedisError, OSError, TimeoutError) as e:
            raise RedisDown(detail=type(e).__name__) from e
        entries = [fields for _, batch in reply for _, fields in batch]
        uses: dict[UUID, datetime] = {}
        for key_id, at in filter(None, map(_use, entries)):
            uses[key_id] = max(at, uses.get(key_id, at))
        return len(entries), uses

    async def _join(self) -> tuple[int, dict[UUID, datetime]]:
        """Make stream and group, where they never were or Redis was emptied."""
        try:
            await self._redis.xgroup_create(apikeys.USAGE_STREAM, self.GROUP, id="0", mkstream=True)
        except ResponseError as e:
            if not str(e).startswith("BUSYGROUP"):  # another replica was quicker
                raise RedisDown(detail=type(e).__name__) from e
        except (RedisError, OSError, TimeoutError) as e:
            raise RedisDown(detail=type(e).__name__) from e
        return 0, {}


def _version_name(event: Event) -> str:
    if isinstance(event, KeyEvent):
        return apikeys.version_name(str(event.org_id), str(event.key_id))
    return access_tokens.version_name(str(event.org_id), str(event.session_id))


def _use(fields: dict[bytes, bytes]) -> tuple[UUID, datetime] | None:
    """The key and the time of an event; None for one without a key, or of a form that is not ours."""
    try:
        event = json.loads(fields[b"event"])
        at = datetime.fromisoformat(event["at"])
        return (UUID(event["key_id"]), at) if at.tzinfo else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
