"""Every point at which a test may have the process die, by name: here, and nowhere else.

A point that nobody armed costs a look into an empty dictionary. Only tests arm one: there is no setting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

Failpoint = Literal[
    "batch_taken",  # operations have left the queue; nothing was asked of PostgreSQL
    "batch_read",  # epoch, operations and wallets were read, in the open transaction
    "batch_decided",  # the kernel has decided; nothing is written
    "batch_ahead",  # the next batch is decided, while this one is being written
    "batch_written",  # everything is written; COMMIT was not sent
    "batch_committed",  # COMMIT was acknowledged; no caller has been answered
    "batch_answered",  # callers' futures are resolved; no answer has left the process
    "shard_locked",  # the advisory lock is held; the epoch is still the former leader's
    "shard_led",  # the new epoch is committed; no operation was taken
    "shard_released",  # leadership was given up; the lock's connection is closed
]
FAILPOINTS: tuple[Failpoint, ...] = get_args(Failpoint)

_armed: dict[str, Callable[[], None]] = {}


def arm(name: Failpoint, action: Callable[[], None]) -> None:
    """Have `action` called whenever the point is reached."""
    assert name in FAILPOINTS, f"{name} is no failpoint"
    _armed[name] = action


def disarm() -> None:
    """Forget all of them."""
    _armed.clear()


def reached(name: Failpoint) -> None:
    """Called by the ledger at the point."""
    if _armed and name in _armed:
        _armed[name]()
