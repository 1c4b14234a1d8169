"""Bounded memories of one process."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from shared.clock import Clock

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class BoundedCache(Generic[KeyT, ValueT]):
    """At most `entries_max` entries, each for `ttl_s`; the one that was put first goes first."""

    def __init__(self, clock: Clock, *, entries_max: int, ttl_s: float) -> None:
        self._clock = clock
        self._entries_max = entries_max
        self._ttl_s = ttl_s
        self._entries: OrderedDict[KeyT, tuple[float, ValueT]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: KeyT) -> ValueT | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= self._clock.monotonic_s():
            del self._entries[key]
            return None
        return entry[1]

    def put(self, key: KeyT, value: ValueT) -> None:
        self._entries.pop(key, None)
        while len(self._entries) >= self._entries_max:
            self._entries.popitem(last=False)
        self._entries[key] = (self._clock.monotonic_s() + self._ttl_s, value)

    def remove(self, key: KeyT) -> None:
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()
