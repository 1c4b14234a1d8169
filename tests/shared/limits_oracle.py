"""Brute force: what the limiter should answer, from the list of everything that it admitted."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shared.limits import Limits

SECOND = 1_000_000
MILLISECOND = 1_000
MINUTE, HOUR, DAY = 60 * SECOND, 3_600 * SECOND, 86_400 * SECOND
CELL = 300 * SECOND
EPOCH = 1_780_000_000 * SECOND
EPOCH -= EPOCH % CELL


@dataclass
class Oracle:
    """Times in µs. Everything is counted anew for each question."""

    admitted: list[int] = field(default_factory=list)

    def now(self, time_us: int) -> int:
        return max([time_us, *self.admitted[-1:]])

    def used(self, time_us: int) -> tuple[int, int, int]:
        """In the last minute, the last hour, and the cells that touch the last day."""
        now = self.now(time_us)
        oldest_cell = now // CELL - DAY // CELL
        return (
            sum(1 for t in self.admitted if t > now - MINUTE),
            sum(1 for t in self.admitted if t > now - HOUR),
            sum(1 for t in self.admitted if t // CELL >= oldest_cell),
        )

    def fits(self, limits: Limits, weight: int, time_us: int) -> tuple[bool, ...]:
        """For each window, whether a request would be within its quota."""
        return tuple(q is None or u + weight <= q for u, q in zip(self.used(time_us), limits.quotas, strict=True))

    def record(self, time_us: int, weight: int) -> None:
        self.admitted.extend([self.now(time_us)] * weight)


def most_in_any_interval(times: Iterable[int], length: int) -> int:
    """The largest number of times in any half-open interval (t - length, t]."""
    ordered = sorted(times)
    most = first = 0
    for last, t in enumerate(ordered):
        while ordered[first] <= t - length:
            first += 1
        most = max(most, last - first + 1)
    return most


def arrivals(seed: int, count: int, start: int = EPOCH) -> Iterator[int]:
    """Bursts, pauses, and steps that land on the edges of windows and cells, a microsecond or millisecond off them."""
    rng = random.Random(seed)
    edges = (MINUTE, HOUR, CELL, MINUTE // 2)
    now, burst_began = start, start
    for _ in range(count):
        kind = rng.random()
        if kind < 0.5:
            now += rng.choice((0, 1, 10, MILLISECOND, 20 * MILLISECOND))
        elif kind < 0.75:
            now += rng.randrange(20 * SECOND)
        elif kind < 0.9:
            off = rng.choice((-MILLISECOND, -1, 0, 1, MILLISECOND))
            now = max(now, burst_began + rng.choice(edges) + off)
            burst_began = now
        elif kind < 0.97:
            now = max(now, (now // CELL + 1) * CELL + rng.choice((-MILLISECOND, -1, 0, 1)))
        else:
            now += rng.choice((HOUR, 6 * HOUR, DAY - CELL, DAY, DAY + CELL, 3 * DAY))
        yield now


def worst_case_arrivals(quota: int, length: int, start: int = EPOCH) -> list[int]:
    """Silence, a burst at the very end of a cell of that length, then as fast as possible through the next cell."""
    edge = (start // length + 1) * length
    return [edge - 1] * quota + [edge + i * length // (4 * quota) for i in range(4 * quota)]
