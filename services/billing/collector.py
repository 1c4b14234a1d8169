"""Python's cyclic garbage collector, for a process that makes whole batches of rows and keeps many books."""

from __future__ import annotations

import gc

# New objects before the youngest, and collections before each older generation. A batch makes tens of thousands of
# objects and lets go of them without a cycle; CPython's 700 would look at them again and again while they live, and at
# every book in memory as often: a third of the writer's processor time (docs/billing.md). What is in cycles waits for a
# few megabytes more.
THRESHOLDS = (50_000, 20, 100)


def collect_seldom() -> None:
    """For the life of the process."""
    gc.set_threshold(*THRESHOLDS)
