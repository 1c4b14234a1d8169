"""What runs beside the requests: announcements of changed keys, the heartbeat, the leases, the key set."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from services.gateway.admission import Admission
from services.gateway.keys import KeyStore
from services.gateway.tokens import JsonWebKeySet, KeySetUnavailable
from shared import apikeys
from shared.clock import Clock
from shared.limits import RedisLimiter, RedisLink, RedisUnavailable, Script
from shared.telemetry import GatewayMetrics, get_logger

log = get_logger(__name__)

HEARTBEAT = Path(__file__).parent / "heartbeat.lua"
GATEWAYS = "tollgate:gateways"
RECONNECT_PAUSE_S = 0.5
DIGEST_CHARS = 64


class KeyAnnouncements:
    """Hears of changed keys by pub/sub and purges them. `alive` is False from the moment that the link is in doubt."""

    def __init__(
        self, redis: Redis, keys: KeyStore, clock: Clock, *, ping_interval_s: float = 1, silence_max_s: float = 3
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._ping_interval_s = ping_interval_s
        self._silence_max_s = silence_max_s
        self._subscribed = False
        self._heard_at_s = float("-inf")

    def alive(self) -> bool:
        """Whether an announcement made now would be heard."""
        return self._subscribed and self._clock.monotonic_s() - self._heard_at_s < self._silence_max_s

    async def run(self) -> None:
        """Listen for ever; connects again after every loss."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(apikeys.CHANNEL)
                    await self._listen(pubsub)
            except (RedisError, OSError, TimeoutError) as e:
                if self._subscribed:
                    log.warning("key_announcements_lost", detail=type(e).__name__)
            finally:
                self._subscribed = False
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _listen(self, pubsub: PubSub) -> None:
        self._heard_at_s = pinged_at_s = self._clock.monotonic_s()
        while self._clock.monotonic_s() - self._heard_at_s < self._silence_max_s:
            if self._clock.monotonic_s() - pinged_at_s >= self._ping_interval_s:
                pinged_at_s = self._clock.monotonic_s()
                await pubsub.ping()
            message = await pubsub.get_message(timeout=self._ping_interval_s)
            if message is None:
                continue
            self._heard_at_s = self._clock.monotonic_s()
            if message["type"] == "subscribe":
                self._keys.purge_all()  # what was announced before is not heard any more
                self._subscribed = True
            elif message["type"] == "message":
                self._purge(message["data"])
        log.warning("key_announcements_silent")

    def _purge(self, data: bytes) -> None:
        if len(data) == DIGEST_CHARS:
            self._keys.purge(data.decode("ascii", "replace"))


class Heartbeat:
    """Tells the other gateways that this one is alive, and admission how many there are."""

    def __init__(
        self, link: RedisLink, admission: Admission, metrics: GatewayMetrics, *, interval_s: float, ttl_s: float
    ) -> None:
        self._beat = Script.read(link, HEARTBEAT)
        self._link = link
        self._admission = admission
        self._redis_up = metrics.redis_up
        self._interval_s = interval_s
        self._ttl_ms = int(ttl_s * 1000)
        self._instance = secrets.token_hex(8)

    async def run(self) -> None:
        """Beat for ever; on the way out, leave at once. A silent Redis leaves the last known number standing."""
        try:
            while True:
                try:
                    self._admission.live_gateways = max(
                        1, await self._beat((GATEWAYS,), (self._instance, self._ttl_ms))
                    )
                except RedisUnavailable:
                    self._redis_up.set(0)
                else:
                    self._redis_up.set(1)
                await asyncio.sleep(self._interval_s)
        finally:
            with contextlib.suppress(RedisUnavailable):
                await self._link.call("ZREM", GATEWAYS, self._instance)


async def renew_leases(limiter: RedisLimiter, interval_s: float) -> None:
    """Keep the places of requests that run; while Redis is away they expire there, and nothing is lost but slots."""
    while True:
        await asyncio.sleep(interval_s)
        with contextlib.suppress(RedisUnavailable):
            await limiter.renew_leases()


async def refresh_key_set(key_set: JsonWebKeySet, interval_s: float, retry_s: float = 2) -> None:
    """Fetch auth's key set now and then, so that a rotation is known before its first token comes."""
    while True:
        try:
            await key_set.fetch()
        except KeySetUnavailable as e:
            log.warning("jwks_fetch_failed", detail=str(e))
            await asyncio.sleep(retry_s)
        else:
            await asyncio.sleep(interval_s)
