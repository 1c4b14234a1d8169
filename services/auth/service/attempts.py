"""Back-off after failed sign-ins.

An attempt counts as failed before its password is looked at, and is taken back when it was right: of a hundred that
come at once, no more are tried than one after the other. What is blocked costs no argon2, is not counted, and depends
on what was typed alone, so that an unknown name looks like a known one.

Three counts, each of the failures since its first one, at most `memory_s` ago:

- of a name at an address: blocks this address for this name;
- of an address: blocks it for every name (one password tried on many names);
- of a name, wherever from: blocks nobody, but leaves a new address one attempt in place of several. So nobody else's
  failures lock a person out, and a thousand addresses have a thousand guesses, not five thousand.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import IPv6Address, ip_address, ip_network

from services.auth.domain import AttemptCount
from services.auth.errors import SignInBlocked
from services.auth.repository.attempts import AttemptRepository
from services.auth.repository.sign_in import SignInDatabase
from shared.clock import Clock

IPV6_SITE_BITS = 64  # one customer's line; its addresses are free to choose
DOUBLINGS_MAX = 30
KNOWN_BLOCK_S = 1.0
KNOWN_BLOCKS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class AttemptLimits:
    """How many failures are free of a name at an address, of a name, of an address; the back-off's first and longest
    wait, doubled in between; how long failures are remembered; how many old counts are deleted at once.
    """

    pair_free: int
    name_free: int
    address_free: int
    backoff_base_ms: int
    backoff_max_s: int
    memory_s: int
    prune_batch_max: int


@dataclass(slots=True)
class Attempt:
    """One attempt under way: call `succeeded` when the secret was right, `withdraw` when it was not looked at."""

    name: str
    address: str
    pair: str
    blocks: dict[str, datetime | None] = field(default_factory=dict)
    blocked_s: float = 0
    taken_back: bool = False
    right: bool = False

    def succeeded(self) -> None:
        self.taken_back = self.right = True

    def withdraw(self) -> None:
        self.taken_back = True


class Attempts:
    def __init__(self, database: SignInDatabase, secret_key: bytes, clock: Clock, limits: AttemptLimits) -> None:
        self._database = database
        self._digest_key = hmac.digest(secret_key, b"tollgate sign-in attempts", hashlib.sha256)
        self._clock = clock
        self._limits = limits
        self._known_blocks = _KnownBlocks()

    @asynccontextmanager
    async def of(self, login: str, address: str | None) -> AsyncIterator[Attempt]:
        """Count an attempt for what was typed as a name. Raises SignInBlocked, with the seconds to wait.

        One that ends in an error of ours, a full queue for instance, must be withdrawn by the caller; one whose
        client hung up stays counted.
        """
        attempt = await self._begin(login, address)
        try:
            yield attempt
        finally:
            if attempt.taken_back:
                await self._take_back(attempt)

    async def prune(self) -> bool:
        """Delete one batch of counts that are forgotten; whether there may be more."""
        batch_max = self._limits.prune_batch_max
        before = self._clock.now() - timedelta(seconds=self._limits.memory_s + self._limits.backoff_max_s)
        async with self._database.connection() as connection:
            return await AttemptRepository(connection).prune(before, batch_max) == batch_max

    async def _begin(self, login: str, address: str | None) -> Attempt:
        name, site, now = login.casefold(), _site(address), self._clock.now()
        attempt = Attempt(
            self._subject("name", name), self._subject("address", site), self._subject("pair", name, site)
        )
        subjects = (attempt.name, attempt.address, attempt.pair)
        if (blocked_s := self._known_blocks.longest_s(subjects, now)) > 0:
            raise SignInBlocked(retry_after_s=blocked_s)
        async with self._database.connection() as connection, connection.transaction():
            repository = AttemptRepository(connection)
            counts = await repository.lock(subjects, now)
            if any(_blocked_s(count, now) > 0 for count in counts.values()):  # nothing of this transaction stays
                self._known_blocks.remember(counts)
                raise SignInBlocked(retry_after_s=max(_blocked_s(count, now) for count in counts.values()))
            name_count = self._counted(counts[attempt.name], now, free=None)
            under_attack = name_count.failures > self._limits.name_free
            pair_free = 1 if under_attack else self._limits.pair_free
            after = {
                attempt.name: name_count,
                attempt.address: self._counted(counts[attempt.address], now, free=self._limits.address_free),
                attempt.pair: self._counted(counts[attempt.pair], now, free=pair_free),
            }
            await repository.put(after)
        attempt.blocks = {subject: count.blocked_until for subject, count in after.items()}
        attempt.blocked_s = max(_blocked_s(count, now) for count in after.values())
        return attempt

    async def _take_back(self, attempt: Attempt) -> None:
        async with self._database.connection() as connection:
            forgotten = (attempt.pair,) if attempt.right else ()
            await AttemptRepository(connection).take_back(attempt.blocks, forgotten)

    def _counted(self, count: AttemptCount, now: datetime, *, free: int | None) -> AttemptCount:
        """The count with one failure more, blocked from the `free`th on; `free` None never blocks."""
        remembered = count.since + timedelta(seconds=self._limits.memory_s) > now
        failures, since = (count.failures + 1, count.since) if remembered else (1, now)
        if free is None or failures < free:
            return AttemptCount(failures, since, None)
        wait = timedelta(milliseconds=self._limits.backoff_base_ms) * 2 ** min(failures - free, DOUBLINGS_MAX)
        return AttemptCount(failures, since, now + min(wait, timedelta(seconds=self._limits.backoff_max_s)))

    def _subject(self, kind: str, *parts: str) -> str:
        text = "\0".join((kind, *parts)).encode()
        return hmac.new(self._digest_key, text, hashlib.sha256).hexdigest()


class _KnownBlocks:
    """Blocks that PostgreSQL told of a moment ago, so that whoever goes on all the same costs it nothing more. Only for
    a moment: a sign-in that is under way may turn out right, and lift the block that it made.
    """

    def __init__(self) -> None:
        self._untils: dict[str, tuple[datetime, float]] = {}

    def remember(self, counts: Mapping[str, AttemptCount]) -> None:
        if len(self._untils) + len(counts) > KNOWN_BLOCKS_MAX:
            self._untils.clear()
        forget_at = time.monotonic() + KNOWN_BLOCK_S
        self._untils |= {s: (c.blocked_until, forget_at) for s, c in counts.items() if c.blocked_until is not None}

    def longest_s(self, subjects: Iterable[str], now: datetime) -> float:
        """How many seconds one of them is blocked yet, at least; 0 where PostgreSQL must be asked."""
        known = [self._untils[subject] for subject in subjects if subject in self._untils]
        moment = time.monotonic()
        return max(((until - now).total_seconds() for until, forget_at in known if moment < forget_at), default=0)


def _blocked_s(count: AttemptCount, now: datetime) -> float:
    return max((count.blocked_until - now).total_seconds(), 0) if count.blocked_until else 0


def _site(address: str | None) -> str:
    """What counts as one address: an IPv4 address, the /64 of an IPv6 one, or the unknown."""
    if address is None:
        return ""
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ip_network((parsed, IPV6_SITE_BITS), strict=False))
    return address
