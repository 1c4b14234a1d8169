"""API keys: from the secret that a client shows to the record that it stands for.

    shape ─► process cache ─► checksum ─► Redis ─► PostgreSQL (one read a key at a time) ─► back into both

A record from a cache is only a guess about its organisation and version: the admission script wants the same version
in Redis, and where it finds another or none, `refresh` asks PostgreSQL. So a revoked key fails on its next request,
and an emptied Redis lets nothing through. Fills never overwrite a higher version. Changes are also announced over the
link to Redis and purge the process cache; while that link is down, the cache is not used, and afterwards it is empty.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.gateway.caches import BoundedCache
from services.gateway.domain import ACTIVE, KeyRecord, record_from_json, record_to_json
from services.gateway.flights import Flights
from services.gateway.guesses import Guesses
from services.gateway.repository import DatabaseUnavailable, KeyRepository
from shared import apikeys
from shared.clock import Clock
from shared.errors import Unauthenticated, Unavailable
from shared.limits import Link, RedisUnavailable, Script
from shared.telemetry import GatewayMetrics

FILL = Path(__file__).parent / "fill.lua"
FILL_ATTEMPTS_MAX = 3


@dataclass(frozen=True, slots=True)
class Found:
    """A key's record; `fresh` when PostgreSQL was asked for it after the request had come.

    `filled` is False when Redis would not take the record's version: then its script cannot know the key, and what it
    says of it is worth nothing.
    """

    record: KeyRecord
    fresh: bool
    filled: bool = True


class KeyStore:
    """See the module. `guesses` bounds how often one address may make PostgreSQL look for nothing."""

    def __init__(
        self,
        *,
        peppers: apikeys.Peppers,
        repository: KeyRepository,
        link: Link,
        clock: Clock,
        metrics: GatewayMetrics,
        guesses: Guesses,
        process_entries_max: int,
        process_ttl_s: float,
        negative_entries_max: int,
        negative_ttl_s: float,
    ) -> None:
        self._peppers = peppers
        self._repository = repository
        self._link = link
        self._clock = clock
        self._lookups = metrics.key_lookups
        self._known = metrics.key_lookups.labels("process")
        self._junk = metrics.key_lookups.labels("junk")
        self._fill = Script.read(link, FILL)
        self._records: BoundedCache[str, KeyRecord] = BoundedCache(
            clock, entries_max=process_entries_max, ttl_s=process_ttl_s
        )
        self._unknown: BoundedCache[str, bool] = BoundedCache(
            clock, entries_max=negative_entries_max, ttl_s=negative_ttl_s
        )
        self._guesses = guesses
        self._flights: Flights[Found] = Flights()
        link.subscribe(apikeys.CHANNEL, self._announced, self._records.clear)

    def known(self, secret: str) -> Found | None:
        """The record of a key that this process knows; None for one that `find` has to look for. Raises as `find`."""
        if not apikeys.may_be_key(secret):
            self._junk.inc()
            raise Unauthenticated()
        if (record := self._from_process(self._peppers.candidates(secret))) is None:
            return None
        self._known.inc()
        return Found(self._usable(record), fresh=False)

    def still_known(self, record: KeyRecord) -> bool:
        """Whether `known` would find this very record, for the key that it was found for. Raises Unauthenticated."""
        if not self._link.up or self._records.get(record.digest) is not record:
            return False
        self._known.inc()
        self._usable(record)
        return True

    async def find(self, secret: str, address: str) -> Found:
        """The record of a key that is active and not expired, and not `known`.

        Raises Unauthenticated, the same for every cause; Unavailable; RateLimited for an address that only guesses.
        """
        if not apikeys.is_well_formed(secret):
            self._junk.inc()
            raise Unauthenticated()
        digests = [d.hex for d in self._peppers.candidates(secret)]
        if all(self._unknown.get(d) for d in digests):
            self._count("negative")
            raise Unauthenticated()
        if (record := await self._from_redis(digests)) is not None:
            self._count("redis")
            self._records.put(record.digest, record)
            return Found(self._usable(record), fresh=False)
        return await self._from_database(digests, address)

    async def refresh(self, record: KeyRecord) -> Found:
        """The record as PostgreSQL has it now: no read that began earlier will do. Raises as `find`."""
        self.purge(record.digest)
        return await self._from_database([record.digest], "", join=False)

    def purge(self, digest: str) -> None:
        """Forget what this process knows of a key: it changed."""
        self._records.remove(digest)
        self._unknown.remove(digest)

    def _announced(self, message: bytes) -> None:
        self.purge(message.decode("ascii", "replace"))

    def _usable(self, record: KeyRecord) -> KeyRecord:
        if record.status != ACTIVE or (record.expires_at is not None and not record.is_usable(self._clock.now())):
            raise Unauthenticated()
        return record

    def _from_process(self, digests: list[apikeys.Digest]) -> KeyRecord | None:
        if not self._link.up:
            return None
        for digest in digests:
            if (record := self._records.get(digest.hex)) is not None:
                return record
        return None

    async def _from_redis(self, digests: list[str]) -> KeyRecord | None:
        try:
            replies = await asyncio.gather(*[self._link.call("GET", apikeys.record_name(d)) for d in digests])
        except RedisUnavailable:
            return None
        for reply in replies:
            if reply is not None and (record := record_from_json(reply)) is not None:
                return record
        return None

    async def _from_database(self, digests: list[str], address: str, *, join: bool = True) -> Found:
        """What PostgreSQL says; with `join` also what a read says that began before: then it is not `fresh`."""
        name = digests[0]
        earlier = self._flights.running(name) if join else None
        flight = earlier or self._flights.begun_from_now_on(name, partial(self._read_and_fill, digests, address))
        try:
            # A caller that leaves must not take the read away from the others.
            found = await asyncio.shield(flight)
        except DatabaseUnavailable as e:
            raise Unavailable(
                "Keys cannot be checked right now. Retry.", retry_after_s=1, detail=f"PostgreSQL: {e}"
            ) from e
        except Unauthenticated:
            self._count("postgres")
            raise
        self._count("postgres")
        return Found(self._usable(found.record), fresh=earlier is None, filled=found.filled)

    async def _read_and_fill(self, digests: list[str], address: str) -> Found:
        """Read until what was read is not older than what Redis knows of. Raises Unauthenticated, RateLimited."""
        with self._guesses.attempt(address):
            record, filled = await self._read_latest(digests)
        return Found(record, fresh=True, filled=filled)

    async def _read_latest(self, digests: list[str]) -> tuple[KeyRecord, bool]:
        for _ in range(FILL_ATTEMPTS_MAX):
            record = await self._repository.find(digests)
            if record is None or not record.is_usable(self._clock.now()):
                for digest in digests:
                    self._unknown.put(digest, True)
                raise Unauthenticated()
            try:
                is_latest = await self._fill_redis(record)
            except RedisUnavailable:
                return record, False
            if is_latest:
                self._records.put(record.digest, record)
                return record, True
        raise DatabaseUnavailable("PostgreSQL lags behind Redis")

    async def _fill_redis(self, record: KeyRecord) -> bool:
        """Whether the version is the latest that Redis knows of. Raises RedisUnavailable, also when it cannot write."""
        name = apikeys.version_name(record.org_id, record.key_id)
        if not await self._fill((name,), (record.version, apikeys.CACHE_TTL_S)):
            return False
        self._link.send(
            "SET", apikeys.record_name(record.digest), record_to_json(record), "EX", str(apikeys.CACHE_TTL_S)
        )
        return True

    def _count(self, source: str) -> None:
        self._lookups.labels(source).inc()
