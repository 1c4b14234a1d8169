"""A circuit breaker for each build: one that keeps failing is left alone for a while, or until it was loaded anew.

closed ── `failures_max` failures in a row ──► open ── `pause_s` ──► one trial ── success ──► closed
                                                 ▲                       └── failure ──┘
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _State:
    failures: int = 0
    closed_at_s: float = 0.0


class Breakers:
    """By name. `now_s` is a monotonic clock in seconds."""

    def __init__(self, *, failures_max: int, pause_s: float, now_s: Callable[[], float]) -> None:
        self._failures_max = failures_max
        self._pause_s = pause_s
        self._now_s = now_s
        self._states: dict[str, _State] = {}

    def admits(self, name: str) -> bool:
        """Whether it may be tried now."""
        state = self._states.get(name)
        return state is None or state.failures < self._failures_max or self._now_s() >= state.closed_at_s

    def trying(self, name: str) -> None:
        """Somebody tries it: of one that is open no other caller gets a trial for another pause."""
        state = self._states.get(name)
        if state is not None and state.failures >= self._failures_max:
            state.closed_at_s = self._now_s() + self._pause_s

    def forget(self, name: str) -> None:
        """It is another process now: what the one before failed at says nothing of it."""
        self._states.pop(name, None)

    def succeeded(self, name: str) -> None:
        self.forget(name)

    def failed(self, name: str) -> None:
        state = self._states.setdefault(name, _State())
        state.failures += 1
        if state.failures >= self._failures_max:
            state.closed_at_s = self._now_s() + self._pause_s
