"""What runs beside the requests: the heartbeat, the leases, the key set."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from pathlib import Path

from services.gateway.admission import Admission
from services.gateway.tokens import JsonWebKeySet, KeySetUnavailable
from shared.limits import Link, RedisLimiter, RedisUnavailable, Script
from shared.telemetry import GatewayMetrics, get_logger

log = get_logger(__name__)

HEARTBEAT = Path(__file__).parent / "heartbeat.lua"
GATEWAYS = "tollgate:gateways"


class Heartbeat:
    """Tells the other gateways that this one is alive, and admission how many there are."""

    def __init__(
        self, link: Link, admission: Admission, metrics: GatewayMetrics, *, interval_s: float, ttl_s: float
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


async def refresh_key_set(key_set: JsonWebKeySet, interval_s: float, retry_s: float = 0.3) -> None:
    """Fetch auth's key set now and then, so that a rotation is known before its first token comes."""
    while True:
        try:
            await key_set.fetch()
        except KeySetUnavailable as e:
            log.warning("jwks_fetch_failed", detail=str(e))
            await asyncio.sleep(retry_s)
        else:
            await asyncio.sleep(interval_s)
