"""Redis, where gateways look keys up: what auth tells it when a key changes.

Per change, in this order: the key's version goes up (never down, so that a late delivery does no harm), the cached
record goes, and every gateway hears the digest. From the first of the three on, no admission finds the version that it
wants, and asks PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.auth.domain import KeyEvent
from services.auth.errors import KeyChannelDown
from shared import apikeys

_RAISE_VERSION = """
local held = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
if tonumber(ARGV[1]) > held then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
end
return 1
"""


class KeyChannel:
    """Tells gateways about changed keys."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def announce(self, events: Sequence[KeyEvent]) -> None:
        """Deliver changes; saying one twice does no harm. Raises KeyChannelDown when not all of them arrived."""
        pipeline = self._redis.pipeline(transaction=False)
        for event in events:
            name = apikeys.version_name(str(event.org_id), str(event.key_id))
            pipeline.eval(_RAISE_VERSION, 1, name, str(event.version), str(apikeys.CACHE_TTL_S))
            pipeline.delete(apikeys.record_name(event.digest))
            pipeline.publish(apikeys.CHANNEL, event.digest)
        try:
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as e:
            raise KeyChannelDown(detail=type(e).__name__) from e
