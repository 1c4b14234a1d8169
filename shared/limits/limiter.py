"""The limiter in Redis: one script a request, exact over any number of processes."""

from __future__ import annotations

import asyncio
import secrets
from itertools import count
from pathlib import Path
from typing import Any

from shared.limits.link import RedisLink
from shared.limits.policy import WINDOWS, Decision, Lease, Subject, Verdict, WindowState
from shared.limits.scripts import Script

HERE = Path(__file__).parent
ADMIT = HERE / "admit.lua"
RENEW = HERE / "renew.lua"
MICROSECONDS = 1_000_000


class RedisLimiter:
    """Decides by admit.lua, and keeps the leases of requests that run."""

    def __init__(self, link: RedisLink, *, lease_ttl_s: float = 60, admit: Script | None = None) -> None:
        self._link = link
        self._lease_ttl_ms = int(lease_ttl_s * 1000)
        self._admit = admit or Script.read(link, ADMIT)
        self._renew = Script.read(link, RENEW)
        self._lease_prefix = secrets.token_hex(8)
        self._lease_numbers = count()
        self._held: dict[str, set[str]] = {}

    async def admit(self, subject: Subject, *, weight: int = 1) -> Decision:
        """Decide and, when admitted, record. Weight 0 only looks. Raises RedisUnavailable: then nobody knows."""
        limits = subject.limits
        leased = bool(limits.concurrency and weight)
        lease_id = f"{self._lease_prefix}-{next(self._lease_numbers)}" if leased else ""
        names: tuple[str, ...] = (subject.state_name, subject.leases_name)
        if subject.version_name:
            names = (*names, subject.version_name)
        arguments = (weight, *limits.quotas, limits.concurrency, lease_id, self._lease_ttl_ms, subject.version)
        try:
            answer = await self._admit(names, arguments)
        except asyncio.CancelledError:
            if leased:  # replies are in order: this runs after the script, if that runs at all
                self._link.send("ZREM", subject.leases_name, lease_id)
            raise
        decision = _decision(subject, answer)
        if not (leased and decision.admitted):
            return decision
        self._held.setdefault(subject.leases_name, set()).add(lease_id)
        lease = Lease(lease_id, subject.limit_id, subject.leases_name)
        return Decision(decision.verdict, decision.windows, lease=lease)

    def release(self, lease: Lease) -> None:
        """Give a place back. What does not reach Redis expires there."""
        held = self._held.get(lease.name)
        if held is None or lease.id not in held:
            return
        held.discard(lease.id)
        if not held:
            del self._held[lease.name]
        self._link.send("ZREM", lease.name, lease.id)

    async def renew_leases(self) -> None:
        """Prolong the leases of all requests that run; call it at least twice per TTL. Raises RedisUnavailable."""
        for name, ids in list(self._held.items()):
            if ids:
                await self._renew((name,), (self._lease_ttl_ms, *ids))


def _decision(subject: Subject, answer: list[Any]) -> Decision:
    verdict = Verdict(answer[0])
    if verdict is Verdict.STALE:
        return Decision(verdict)
    windows = tuple(
        [
            WindowState(
                name,
                length_s,
                quota,
                answer[2 + 3 * i],
                answer[3 + 3 * i] / MICROSECONDS,
                answer[4 + 3 * i] / MICROSECONDS,
            )
            for i, ((name, length_s), quota) in enumerate(zip(WINDOWS, subject.limits.quotas, strict=True))
        ]
    )
    too_many = bool(subject.limits.concurrency and answer[1] >= subject.limits.concurrency)
    return Decision(verdict, windows, too_many_at_once=too_many and verdict is Verdict.REFUSED)
