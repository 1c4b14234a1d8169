"""Tokens per minute: reserve what a request may use at most, give back what it did not.

    limiter = TokenLimiter(link, clock, processes=settings.replicas)            # one a process; link: Link
    decision = await limiter.reserve(
        TokenSubject(identity.org_id, identity.limit_id, quota=identity.tokens_per_minute), prompt + max_tokens
    )
    if not decision.admitted:
        raise RateLimited(..., retry_after_s=decision.retry_after_s, headers=token_headers(decision))
    try:
        ...                                                                     # headers of the answer: token_headers
    finally:
        limiter.settle(decision.reservation, used=prompt + completion)          # never waits; once; 0 when nothing ran

No interval of a minute ever holds more tokens than the quota, counted at the moment of their reservation, over any
number of processes; a refusal records nothing. A quota of 0 is no limit, and costs nothing. A process that is killed
leaves its reservations to leave the window by themselves, so there is nothing to renew and nothing to sweep.

Redis away: `reserve` decides alone at its share of the quota, as LocalLimiter does; what a switch can let through is
the quota once more. A reservation settles where it was made; one that cannot be given back counts for its minute.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shared.clock import Clock
from shared.limits.link import Link, RedisUnavailable
from shared.limits.local import SUBJECTS_MAX
from shared.limits.policy import MINUTE_S
from shared.limits.scripts import Script

HERE = Path(__file__).parent
RESERVE = HERE / "reserve_tokens.lua"
SETTLE = HERE / "settle_tokens.lua"
TOKENS_MAX = 1_000_000_000_000  # an entry's amount has five bytes
MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class TokenSubject:
    """Whose tokens per minute: `tag` is the organisation, `limit_id` unique in it, `quota` 0 for no limit."""

    tag: str
    limit_id: str
    quota: int

    @property
    def state_name(self) -> str:
        """Redis: the reservations of the last minute."""
        return f"{{{self.tag}}}:tokens:{self.limit_id}"


@dataclass(slots=True, eq=False)
class _Entry:
    """A reservation in this process."""

    at_s: float
    tokens: int


@dataclass(slots=True, eq=False)
class Reservation:
    """Tokens that a request may use. Made by `reserve`, ended by `settle`."""

    subject: TokenSubject
    amount: int
    number: int
    time_us: int
    local: _Entry | None = None
    settled: bool = False


@dataclass(frozen=True, slots=True)
class TokenDecision:
    """The limiter's answer. `reset_s`: until the minute gives something back; `wait_s`: until the refused amount fits.

    `reservation` is None for what was refused and for what is not limited. `never_fits`: the amount is larger than the
    quota, and waiting does not help.
    """

    admitted: bool
    quota: int
    remaining: int = 0
    reset_s: float = 0
    wait_s: float = 0
    never_fits: bool = False
    reservation: Reservation | None = None

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which the refused amount fits, if nobody else draws on the quota meanwhile."""
        return max(1, math.ceil(self.wait_s))


class TokenLimiter:
    """See the module. `processes`: how many share the quotas while Redis is away."""

    def __init__(self, link: Link, clock: Clock, *, processes: int = 1, subjects_max: int = SUBJECTS_MAX) -> None:
        self._reserve = Script.read(link, RESERVE)
        self._settle = Script.read(link, SETTLE)
        self._clock = clock
        self._processes = processes
        self._subjects_max = subjects_max
        self._local: OrderedDict[str, deque[_Entry]] = OrderedDict()

    async def reserve(self, subject: TokenSubject, amount: int) -> TokenDecision:
        """Reserve an amount, or say how long to wait. Amount 0 looks and records nothing."""
        if not subject.quota:
            return TokenDecision(True, 0)
        amount = min(max(amount, 0), TOKENS_MAX)
        call = asyncio.ensure_future(
            self._reserve((subject.state_name,), (min(subject.quota, TOKENS_MAX), amount)),
        )
        try:
            return _decision(subject, amount, await asyncio.shield(call))
        except RedisUnavailable:
            return self._reserve_locally(subject, amount)
        except asyncio.CancelledError:
            call.add_done_callback(partial(self._abandoned, subject, amount))
            raise

    def settle(self, reservation: Reservation | None, used: int) -> None:
        """Keep what was used, give back the rest; None and a second call do nothing. Never waits, never raises."""
        if reservation is None or reservation.settled:
            return
        reservation.settled = True
        used = min(max(used, 0), TOKENS_MAX)
        if reservation.local is not None:
            reservation.local.tokens = used
        elif used != reservation.amount:
            self._settle.send((reservation.subject.state_name,), (reservation.number, reservation.time_us, used))

    def _abandoned(self, subject: TokenSubject, amount: int, call: asyncio.Future[Any]) -> None:
        """The caller left while Redis decided."""
        if not call.cancelled() and call.exception() is None:
            self.settle(_decision(subject, amount, call.result()).reservation, used=0)

    def _reserve_locally(self, subject: TokenSubject, amount: int) -> TokenDecision:
        now_s = self._clock.monotonic_s()
        quota = subject.quota // self._processes
        log = self._log(subject.state_name, now_s)
        if log is None:  # nobody can tell
            return TokenDecision(False, quota, reset_s=1, wait_s=1)
        held = sum(entry.tokens for entry in log)
        reset_s = (log[0].at_s if log else now_s) + MINUTE_S - now_s
        fits = held + amount <= quota
        if not (fits and amount):
            wait_s = 0.0 if fits else _wait_s(log, held + amount - quota, now_s)
            return TokenDecision(fits, quota, max(quota - held, 0), reset_s, wait_s, never_fits=amount > quota)
        entry = _Entry(now_s, amount)
        log.append(entry)
        reservation = Reservation(subject, amount, 0, 0, local=entry)
        return TokenDecision(True, quota, quota - held - amount, reset_s, reservation=reservation)

    def _log(self, name: str, now_s: float) -> deque[_Entry] | None:
        """The subject's reservations of the last minute; None when the table is full of others that still count."""
        log = self._local.get(name)
        if log is None:
            if len(self._local) >= self._subjects_max:
                oldest_name, oldest = next(iter(self._local.items()))
                if oldest and oldest[-1].at_s > now_s - MINUTE_S:
                    return None
                del self._local[oldest_name]
            log = self._local[name] = deque()
        self._local.move_to_end(name)
        while log and log[0].at_s <= now_s - MINUTE_S:
            log.popleft()
        return log


def _decision(subject: TokenSubject, amount: int, answer: list[int]) -> TokenDecision:
    admitted, remaining, reset, wait, number, time_us = answer
    return TokenDecision(
        bool(admitted),
        subject.quota,
        remaining,
        reset / MICROSECONDS,
        wait / MICROSECONDS,
        never_fits=amount > subject.quota,
        reservation=Reservation(subject, amount, number, time_us) if admitted and amount else None,
    )


def _wait_s(log: deque[_Entry], excess: int, now_s: float) -> float:
    """Until enough has left the window; a whole minute where even an empty one would not do."""
    for entry in log:
        excess -= entry.tokens
        if excess <= 0:
            return entry.at_s + MINUTE_S - now_s
    return float(MINUTE_S)
