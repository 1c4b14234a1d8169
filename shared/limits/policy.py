"""What is allowed and what was decided: pure data, shared by the limiter in Redis and the local one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from shared.limits.resp import encoded

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

    None is no such window. Larger figures than the scheme can hold are cut to what it holds, never taken as "no limit".
    """

    minute: int | None = MINUTE_QUOTA
    hour: int | None = HOUR_QUOTA
    day: int | None = DAY_QUOTA
    concurrency: int = 0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Limits:
        """From a key's `limits`; what is missing or null has the default. Raises TypeError or ValueError."""
        return cls(
            minute=_figure(record, "minute", MINUTE_QUOTA, EXACT_QUOTA_MAX),
            hour=_figure(record, "hour", HOUR_QUOTA, EXACT_QUOTA_MAX),
            day=_figure(record, "day", DAY_QUOTA, DAY_QUOTA_MAX),
            concurrency=_figure(record, "concurrency", 0, CONCURRENCY_MAX) or 0,
        )

    @classmethod
    def ceiling(cls, record: Mapping[str, Any]) -> Limits | None:
        """From a ceiling's figures; what is missing or null is not limited, and None is no ceiling at all."""
        ceiling = cls(
            minute=_figure(record, "minute", None, EXACT_QUOTA_MAX),
            hour=_figure(record, "hour", None, EXACT_QUOTA_MAX),
            day=_figure(record, "day", None, DAY_QUOTA_MAX),
            concurrency=_figure(record, "concurrency", 0, CONCURRENCY_MAX) or 0,
        )
        return ceiling if ceiling.concurrency or any(quota is not None for quota in ceiling.quotas) else None

    def to_record(self) -> dict[str, int | None]:
        """The inverse of `from_record` and `ceiling`."""
        return {"minute": self.minute, "hour": self.hour, "day": self.day, "concurrency": self.concurrency}

    def divided(self, parts: int) -> Limits:
        """One part of `parts`; their windows together admit no more than the whole. Concurrency keeps at least one."""
        minute, hour, day = (None if quota is None else quota // parts for quota in self.quotas)
        return Limits(minute, hour, day, max(1, self.concurrency // parts) if self.concurrency else 0)

    @property
    def quotas(self) -> tuple[int | None, int | None, int | None]:
        return self.minute, self.hour, self.day


def _figure(record: Mapping[str, Any], name: str, default: int | None, largest: int) -> int | None:
    value = record.get(name)
    return default if value is None else min(max(int(value), 0), largest)


@dataclass(frozen=True)
class Subject:
    """Who draws on which limits. `tag` is the Redis hash tag (the organisation); `limit_id` is unique in it.

    `version_name` and `version` ask for a positive match of a key's version; empty: no such check. `ceilings` are
    subjects of the same tag that a request draws on as well, or on none; their `owner` says whose they are, in names of
    windows and in messages. Build a subject once and keep it: what is derived from it is kept too.
    """

    tag: str
    limit_id: str
    limits: Limits
    version_name: str = ""
    version: str = ""
    owner: str = ""
    ceilings: tuple[Subject, ...] = ()

    @cached_property
    def state_name(self) -> str:
        """Redis: the state of the windows."""
        return f"{{{self.tag}}}:limit:{self.limit_id}"

    @property
    def leases_name(self) -> str:
        """Redis: the concurrent requests."""
        return f"{{{self.tag}}}:leases:{self.limit_id}"

    @cached_property
    def drawn(self) -> tuple[Subject, ...]:
        """Everything that a request draws on."""
        return (self, *self.ceilings)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Redis: everything that an admission touches, in the script's order."""
        names = [name for subject in self.drawn for name in (subject.state_name, subject.leases_name)]
        return (*names, self.version_name) if self.version_name else tuple(names)

    @cached_property
    def figures(self) -> tuple[int, ...]:
        """The script's quotas: -1 for a window that is not there."""
        return tuple(
            figure
            for subject in self.drawn
            for figure in (*(-1 if q is None else q for q in subject.limits.quotas), subject.limits.concurrency)
        )

    @cached_property
    def encoded(self) -> tuple[int, bytes, bytes]:
        """The same for a packed command: how many, the names, and what the script is told of version and quotas."""
        count = 2 + len(self.names) + len(self.figures)
        return count, encoded(len(self.names), *self.names), encoded(self.version, *self.figures)

    @cached_property
    def windows(self) -> tuple[tuple[int, str, int, int, str], ...]:
        """The windows that are there: where their figures stand in the script's answer, name, length, quota, owner."""
        return tuple(
            (2 + 10 * which + 3 * i, window_name(subject.owner, name), length_s, quota, subject.owner)
            for which, subject in enumerate(self.drawn)
            for i, ((name, length_s), quota) in enumerate(zip(WINDOWS, subject.limits.quotas, strict=True))
            if quota is not None
        )

    @cached_property
    def policy(self) -> str:
        """The RateLimit-Policy of these limits."""
        return ",".join([f'"{name}";q={quota};w={length_s}' for _, name, length_s, quota, _ in self.windows])

    @cached_property
    def headers(self) -> bytes:
        """The headers of an admission: to be filled with remaining and reset of each window, then with quota,
        remaining and reset of the tightest."""
        windows = ",".join([f'"{name}";r=%d;t=%d' for _, name, *_ in self.windows])
        return (
            f"ratelimit-policy: {self.policy}\r\nratelimit: {windows}\r\nx-ratelimit-limit-requests: %d\r\n"
            "x-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %s\r\n"
        ).encode()

    @cached_property
    def lease_names(self) -> tuple[str, ...]:
        """Redis: where a request that runs holds a place."""
        return tuple(subject.leases_name for subject in self.drawn if subject.limits.concurrency)


def window_name(owner: str, window: str) -> str:
    """How a window is called in headers: `minute`, or `organization-minute` for a ceiling's."""
    return f"{owner}-{window}" if owner else window


class Verdict(Enum):
    ADMITTED = 1
    REFUSED = 0
    STALE = -1  # the key has another version in Redis, or none; nothing was looked at


class WindowState(NamedTuple):
    """One window after the decision. `reset_s`: until it gives something back; `wait_s`: until the refused fits.

    `owner`: whose ceiling it is; empty for the key's, the session's or the address's own.
    """

    name: str
    length_s: int
    quota: int
    remaining: int
    reset_s: float
    wait_s: float
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The limiter's answer. `lease` is to be released when an admitted request ends, where there is one.

    `crowded`: None, or who has too many requests at once ("" for the subject itself, else the ceiling's owner).
    `policy` is the RateLimit-Policy header of `windows`.
    """

    verdict: Verdict
    windows: tuple[WindowState, ...] = ()
    crowded: str | None = None
    lease: Lease | None = None
    policy: str = ""

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


class Lease(NamedTuple):
    """A place among the concurrent requests of `names`: in Redis, or in this process when `local`."""

    id: str
    names: tuple[str, ...]
    local: bool = False
