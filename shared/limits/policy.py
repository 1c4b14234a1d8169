"""What is allowed and what was decided: pure data, shared by the limiter in Redis and the local one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

MINUTE_S = 60
HOUR_S = 3_600
DAY_S = 86_400
CELL_S = 300
DAY_CELLS = DAY_S // CELL_S + 1
WINDOWS = (("minute", MINUTE_S), ("hour", HOUR_S), ("day", DAY_S))

MINUTE_QUOTA = 60
HOUR_QUOTA = 1_000
DAY_QUOTA = 10_000
EXACT_QUOTA_MAX = 1_000_000  # the ring takes seven bytes for each
DAY_QUOTA_MAX = 1_000_000_000
CONCURRENCY_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests that any interval of a minute, an hour and a day may admit, and how many may run at once (0: any).

    Larger figures than the scheme can hold are cut to what it holds, never taken as "no limit".
    """

    minute: int = MINUTE_QUOTA
    hour: int = HOUR_QUOTA
    day: int = DAY_QUOTA
    concurrency: int = 0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Limits:
        """From a key's `limits`; what is missing or null has the default."""

        def figure(name: str, default: int, largest: int) -> int:
            value = record.get(name)
            return default if value is None else min(max(int(value), 0), largest)

        return cls(
            minute=figure("minute", MINUTE_QUOTA, EXACT_QUOTA_MAX),
            hour=figure("hour", HOUR_QUOTA, EXACT_QUOTA_MAX),
            day=figure("day", DAY_QUOTA, DAY_QUOTA_MAX),
            concurrency=figure("concurrency", 0, CONCURRENCY_MAX),
        )

    def divided(self, parts: int) -> Limits:
        """One part of `parts`; their windows together admit no more than the whole. Concurrency keeps at least one."""
        return Limits(
            minute=self.minute // parts,
            hour=self.hour // parts,
            day=self.day // parts,
            concurrency=max(1, self.concurrency // parts) if self.concurrency else 0,
        )

    @property
    def quotas(self) -> tuple[int, int, int]:
        return self.minute, self.hour, self.day


@dataclass(frozen=True, slots=True)
class Subject:
    """Who draws on which limits. `tag` is the Redis hash tag (the organisation); `limit_id` is unique in it.

    `version_name` and `version` ask for a positive match of a key's version; empty: no such check.
    """

    tag: str
    limit_id: str
    limits: Limits
    version_name: str = ""
    version: str = ""

    @property
    def state_name(self) -> str:
        """Redis: the state of the windows."""
        return f"{{{self.tag}}}:limit:{self.limit_id}"

    @property
    def leases_name(self) -> str:
        """Redis: the concurrent requests."""
        return f"{{{self.tag}}}:leases:{self.limit_id}"


class Verdict(Enum):
    ADMITTED = 1
    REFUSED = 0
    STALE = -1  # the key has another version in Redis, or none; nothing was looked at


@dataclass(frozen=True, slots=True)
class WindowState:
    """One window after the decision. `reset_s`: until it gives something back; `wait_s`: until the refused fits."""

    name: str
    length_s: int
    quota: int
    remaining: int
    reset_s: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The limiter's answer. `lease` is to be released when an admitted request ends, where there is one."""

    verdict: Verdict
    windows: tuple[WindowState, ...] = ()
    too_many_at_once: bool = False
    lease: Lease | None = None

    @property
    def admitted(self) -> bool:
        return self.verdict is Verdict.ADMITTED

    @property
    def violated(self) -> WindowState | None:
        """The window that the refused request must wait for longest."""
        waiting = [w for w in self.windows if w.wait_s > 0]
        return max(waiting, key=lambda w: w.wait_s) if waiting else None

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which the refused request fits, if nobody else draws on the limits meanwhile.

        For too many requests at once nobody knows; one second.
        """
        violated = self.violated
        return max(1, math.ceil(violated.wait_s)) if violated else 1


@dataclass(frozen=True, slots=True)
class Lease:
    """A place among the concurrent requests of a subject: in Redis under `name`, or in this process (no name)."""

    id: str
    limit_id: str
    name: str = ""
