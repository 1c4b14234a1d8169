"""The limiter of one process, for while Redis is away: the same scheme as admit.lua, over a monotonic clock.

Each of the gateways that were last known to be alive gets an equal share, rounded down, so that together they admit
no more than the limit. A switch to and from here can let through at most the limit once more in each window: what one
side has counted, the other does not know. Logs are kept over such switches, so that a flapping Redis adds no more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from shared.clock import Clock
from shared.limits.policy import (
    CELL_S,
    DAY_CELLS,
    DAY_S,
    HOUR_S,
    MINUTE_S,
    WINDOWS,
    Decision,
    Lease,
    Limits,
    Subject,
    Verdict,
    WindowState,
    window_name,
)

COMPACT_ENTRIES = 256
SUBJECTS_MAX = 50_000


class TooManySubjects(Exception):
    """The table is full of subjects whose requests still count; forgetting one would open its limits."""


class LocalLimiter:
    """Exact minute and hour, conservative day, concurrency. Bounded: at most `subjects_max` logs, of which one may be
    forgotten when nothing was drawn for `longest_window_s`.
    """

    def __init__(
        self, clock: Clock, *, subjects_max: int = SUBJECTS_MAX, longest_window_s: float = DAY_S + CELL_S
    ) -> None:
        self._clock = clock
        self._subjects_max = subjects_max
        self._longest_window_s = longest_window_s
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        self._leases = 0

    def admit(self, subject: Subject, *, weight: int = 1, parts: int = 1) -> Decision:
        """Decide for one share out of `parts`, all or nothing over the subject's ceilings. Raises TooManySubjects."""
        now_s = self._clock.monotonic_s()
        drawn = [_Drawn(each, each.limits.divided(parts), self._log(each.state_name, now_s)) for each in subject.drawn]
        windows = [d.windows(weight, now_s) for d in drawn]
        crowded = [d.subject.owner for d in drawn if weight and d.is_crowded]
        flat = tuple([w for each in windows for w in each])
        policy = ",".join([f'"{w.name}";q={w.quota};w={w.length_s}' for w in flat])
        if crowded or any(w.wait_s > 0 for w in flat):
            return Decision(Verdict.REFUSED, flat, crowded[0] if crowded else None, policy=policy)
        if not weight:
            return Decision(Verdict.ADMITTED, flat, policy=policy)
        self._leases += 1
        lease = Lease(str(self._leases), tuple(d.subject.state_name for d in drawn if d.limits.concurrency), local=True)
        for d in drawn:
            d.log.record(now_s, weight)
            if d.limits.concurrency:
                d.log.leases.add(lease.id)
        after = tuple([w for d in drawn for w in d.windows(0, now_s)])
        return Decision(Verdict.ADMITTED, after, lease=lease if lease.names else None, policy=policy)

    def release(self, lease: Lease) -> None:
        """Give a place back; one that is unknown is ignored."""
        for name in lease.names:
            if log := self._logs.get(name):
                log.leases.discard(lease.id)

    def _log(self, name: str, now_s: float) -> _Log:
        log = self._logs.get(name)
        if log is None:
            if len(self._logs) >= self._subjects_max:
                oldest_name, oldest = next(iter(self._logs.items()))
                if oldest.leases or oldest.last_s > now_s - self._longest_window_s:
                    raise TooManySubjects
                del self._logs[oldest_name]
            log = self._logs[name] = _Log()
        self._logs.move_to_end(name)
        log.advance(now_s)
        return log


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One of the subjects that a request draws on, with this process's share of its limits."""

    subject: Subject
    limits: Limits
    log: _Log

    @property
    def is_crowded(self) -> bool:
        return 0 < self.limits.concurrency <= len(self.log.leases)

    def windows(self, weight: int, now_s: float) -> list[WindowState]:
        """The windows that are there, as they stand now."""
        owner = self.subject.owner
        states = self.log.windows(self.limits, weight, now_s)
        return [w._replace(name=window_name(owner, w.name), owner=owner) for w in states] if owner else states


class _Log:
    """Times of the last hour, and counts of the five-minute cells of the last day."""

    __slots__ = ("cells", "day_count", "hour_tail", "last_s", "leases", "minute_tail", "times")

    def __init__(self) -> None:
        self.times: list[float] = []
        self.minute_tail = 0
        self.hour_tail = 0
        self.cells: deque[list[int]] = deque()
        self.day_count = 0
        self.last_s = float("-inf")
        self.leases: set[str] = set()

    def advance(self, now_s: float) -> None:
        """Forget what has left its window."""
        times = self.times
        while self.minute_tail < len(times) and times[self.minute_tail] <= now_s - MINUTE_S:
            self.minute_tail += 1
        while self.hour_tail < len(times) and times[self.hour_tail] <= now_s - HOUR_S:
            self.hour_tail += 1
        if self.hour_tail > COMPACT_ENTRIES:
            del times[: self.hour_tail]
            self.minute_tail -= self.hour_tail
            self.hour_tail = 0
        while self.cells and self.cells[0][0] <= int(now_s // CELL_S) - DAY_CELLS:
            self.day_count -= self.cells.popleft()[1]

    def record(self, now_s: float, weight: int) -> None:
        """Count an admitted request."""
        self.times.extend([now_s] * weight)
        cell = int(now_s // CELL_S)
        if self.cells and self.cells[-1][0] == cell:
            self.cells[-1][1] += weight
        else:
            self.cells.append([cell, weight])
        self.day_count += weight
        self.last_s = now_s

    def windows(self, limits: Limits, weight: int, now_s: float) -> list[WindowState]:
        """The windows that are there as they stand at `now_s`, and how long `weight` more would have to wait."""
        (minute, minute_s), (hour, hour_s), (day, day_s) = WINDOWS
        states = []
        if limits.minute is not None:
            states.append(self._exact(minute, minute_s, limits.minute, self.minute_tail, weight, now_s))
        if limits.hour is not None:
            states.append(self._exact(hour, hour_s, limits.hour, self.hour_tail, weight, now_s))
        if limits.day is not None:
            states.append(self._day(day, day_s, limits.day, weight, now_s))
        return states

    def _exact(self, name: str, length_s: int, quota: int, tail: int, weight: int, now_s: float) -> WindowState:
        used = len(self.times) - tail
        reset_s = (self.times[tail] if used else now_s) + length_s - now_s
        wait_s = 0.0
        if weight > quota:
            wait_s = float(length_s)
        elif weight and used + weight > quota:
            wait_s = self.times[len(self.times) + weight - quota - 1] + length_s - now_s
        return WindowState(name, length_s, quota, max(quota - used, 0), reset_s, wait_s)

    def _day(self, name: str, length_s: int, quota: int, weight: int, now_s: float) -> WindowState:
        first = self.cells[0][0] if self.cells else int(now_s // CELL_S)
        wait_s = 0.0
        if weight > quota:
            wait_s = float(length_s)
        elif weight and self.day_count + weight > quota:
            wait_s = self._day_wait_s(self.day_count + weight - quota, now_s)
        reset_s = (first + DAY_CELLS) * CELL_S - now_s
        return WindowState(name, length_s, quota, max(quota - self.day_count, 0), reset_s, wait_s)

    def _day_wait_s(self, excess: int, now_s: float) -> float:
        for cell, count in self.cells:
            excess -= count
            if excess <= 0:
                return (cell + DAY_CELLS) * CELL_S - now_s
        raise AssertionError("the cells hold less than their sum")
