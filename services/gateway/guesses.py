"""How many credentials that nobody was given one address may try: each costs a read of PostgreSQL or a verification.

Attempts that are still being checked count as wrong until they are known to be right, so that a burst has no more of
them than the limit leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shared.clock import Clock
from shared.errors import RateLimited, Unauthenticated
from shared.limits import Limits, LocalLimiter, Subject, TooManySubjects


class Guesses:
    """See the module. Of this process only: an address is an IPv4 address or an IPv6 network, "" is never limited."""

    def __init__(self, clock: Clock, *, per_minute: int) -> None:
        self._wrong = LocalLimiter(clock)
        self._limits = Limits(minute=per_minute, hour=60 * per_minute)
        self._checking: Counter[str] = Counter()

    @contextmanager
    def attempt(self, address: str) -> Iterator[None]:
        """Around a check that raises Unauthenticated for what is wrong. Raises RateLimited."""
        if not address:
            yield
            return
        self._refuse_spent(address)
        self._checking[address] += 1
        try:
            yield
        except Unauthenticated:
            with suppress(TooManySubjects):
                self._wrong.admit(self._subject(address))
            raise
        finally:
            self._checking[address] -= 1
            if not self._checking[address]:
                del self._checking[address]

    def _refuse_spent(self, address: str) -> None:
        try:
            windows = self._wrong.admit(self._subject(address), weight=0).windows
        except TooManySubjects:
            return  # the pool of connections still bounds what PostgreSQL has to bear
        tight = [w for w in windows if w.remaining <= self._checking[address]]
        if tight:
            raise RateLimited(
                "Too many unknown keys or bad tokens from this address. Wait as long as Retry-After says.",
                retry_after_s=max(1.0 if w.remaining else w.reset_s for w in tight),
            )

    def _subject(self, address: str) -> Subject:
        return Subject(tag=address, limit_id="wrong-credentials", limits=self._limits)
