"""Time as a dependency: what is handed a `Clock` can be tested at any hour."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """The present, aware, in UTC."""

    def monotonic_s(self) -> float:
        """Seconds that never go back; only differences mean anything."""


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        return time.monotonic()


class FixedClock:
    """A clock for tests: it stands still until `advance` moves it."""

    def __init__(self, start: datetime) -> None:
        self._now = start
        self._monotonic_s = 1_000.0

    def now(self) -> datetime:
        return self._now

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)
        self._monotonic_s += seconds
