"""A bounded queue with priorities, fairness between tenants, and deadlines.

Order: the smallest priority first; inside a priority the tenant that has the fewest items in hand, equals
in turn (round robin); inside a tenant first come, first served. So a tenant with a thousand waiting
requests delays another tenant's first one by one request, not by a thousand.

Bounds: `capacity` entries in all and `tenant_capacity` of one tenant, so that no tenant can fill the
queue for the others; `tenant_hands` items of one tenant in hand at a time (from `get` to `done`), so that
none can have every server either. Expired entries are never handed out by `get`; `expire` returns them.

Every method is safe to call from any thread; `get` alone blocks.
"""

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueFull(Exception):
    """The queue, or the tenant's share of it, is full."""


class QueueClosed(Exception):
    """The queue takes nothing more."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    item: T
    priority: int
    tenant: str
    deadline: float | None


class FairQueue(Generic[T]):
    """See the module. Items are compared by identity. `clock` gives seconds, monotonic."""

    def __init__(self, capacity: int, tenant_capacity: int, tenant_hands: int, clock: Callable[[], float]) -> None:
        assert 1 <= tenant_capacity <= capacity
        assert tenant_hands >= 1
        self._capacity = capacity
        self._tenant_capacity = tenant_capacity
        self._tenant_hands = tenant_hands
        self._clock = clock
        self._changed = threading.Condition()
        self._turns: dict[int, OrderedDict[str, deque[_Entry[T]]]] = {}
        self._entries: dict[int, _Entry[T]] = {}
        self._of_tenant: dict[str, int] = {}
        self._in_hand: dict[str, int] = {}
        self._earliest_deadline = math.inf  # never later than the earliest waiting one
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, item: T, *, priority: int, tenant: str, deadline: float | None) -> None:
        """Append. `deadline` is a moment on the queue's clock. Raises QueueFull, QueueClosed."""
        with self._changed:
            if self._closed:
                raise QueueClosed
            of_tenant = self._of_tenant.get(tenant, 0)
            if len(self._entries) >= self._capacity or of_tenant >= self._tenant_capacity:
                raise QueueFull
            entry = _Entry(item, priority, tenant, deadline)
            self._turns.setdefault(priority, OrderedDict()).setdefault(tenant, deque()).append(entry)
            self._entries[id(item)] = entry
            self._of_tenant[tenant] = of_tenant + 1
            if deadline is not None:
                self._earliest_deadline = min(self._earliest_deadline, deadline)
            self._changed.notify()

    def get(self) -> T | None:
        """The next item that has not expired; blocks while there is none; None once closed.

        Its tenant has one more in hand until somebody says `done`.
        """
        with self._changed:
            while not self._closed:
                entry = self._pop()
                if entry is not None:
                    self._in_hand[entry.tenant] = self._in_hand.get(entry.tenant, 0) + 1
                    return entry.item
                self._changed.wait()
            return None

    def done(self, tenant: str) -> None:
        """An item of the tenant that `get` gave out is finished."""
        with self._changed:
            left = self._in_hand[tenant] - 1
            if left:
                self._in_hand[tenant] = left
            else:
                del self._in_hand[tenant]
            self._changed.notify()

    def remove(self, item: T) -> bool:
        """Take out a waiting item; False when it is not waiting (any more)."""
        with self._changed:
            entry = self._entries.get(id(item))
            if entry is None:
                return False
            self._forget(entry)
            return True

    def expire(self) -> list[T]:
        """Take out every item whose deadline has passed."""
        with self._changed:
            now = self._clock()
            if now < self._earliest_deadline:
                return []
            timed = [entry for entry in self._entries.values() if entry.deadline is not None]
            expired = [entry for entry in timed if entry.deadline is not None and entry.deadline <= now]
            for entry in expired:
                self._forget(entry)
            self._earliest_deadline = min(
                (entry.deadline for entry in timed if entry.deadline is not None and entry.deadline > now),
                default=math.inf,
            )
            return [entry.item for entry in expired]

    def close(self) -> list[T]:
        """Wake every `get` for good; returns what was still waiting."""
        with self._changed:
            self._closed = True
            left = [entry.item for entry in self._entries.values()]
            for entry in list(self._entries.values()):
                self._forget(entry)
            self._changed.notify_all()
            return left

    def _pop(self) -> _Entry[T] | None:
        """The next live entry, its tenant sent to the end of the line."""
        now: float | None = None
        for priority in sorted(self._turns):
            turns = self._turns[priority]
            for tenant in sorted(turns, key=self._hands):  # stable: equals keep their turns
                if self._hands(tenant) >= self._tenant_hands:
                    break
                for entry in turns[tenant]:
                    if entry.deadline is not None:
                        now = self._clock() if now is None else now
                        if entry.deadline <= now:
                            continue  # left for `expire`, which can tell its owner
                    if len(turns[tenant]) > 1:
                        turns.move_to_end(tenant)
                    self._forget(entry)
                    return entry
        return None

    def _hands(self, tenant: str) -> int:
        return self._in_hand.get(tenant, 0)

    def _forget(self, entry: _Entry[T]) -> None:
        del self._entries[id(entry.item)]
        left = self._of_tenant[entry.tenant] - 1
        if left:
            self._of_tenant[entry.tenant] = left
        else:
            del self._of_tenant[entry.tenant]
        turns = self._turns[entry.priority]
        line = turns[entry.tenant]
        line.remove(entry)
        if not line:
            del turns[entry.tenant]
            if not turns:
                del self._turns[entry.priority]
