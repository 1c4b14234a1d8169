"""How a decision looks to clients.

`RateLimit` and `RateLimit-Policy` as in draft-ietf-httpapi-ratelimit-headers-11; `x-ratelimit-*-requests` as OpenAI's
clients read them, for the window with the fewest requests left, the reset as a Go duration (`31s`, `12ms`).
All resets say when the window begins to give something back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

from shared.limits.policy import Decision, Subject
from shared.limits.tokens import TokenDecision

MICROSECONDS = 1_000_000
REMEMBERED_MAX = 4_096


def rate_limit_headers(decision: Decision) -> dict[str, str]:
    """The headers of every limited response, admitted or not; `Retry-After` is the error's own business."""
    windows = decision.windows
    if not windows:
        return {}
    tightest = windows[0]
    for window in windows:
        if (window.remaining, -window.reset_s) < (tightest.remaining, -tightest.reset_s):
            tightest = window
    return {
        "ratelimit-policy": decision.policy,
        "ratelimit": ",".join([f'"{w.name}";r={w.remaining};t={ceil(w.wait_s or w.reset_s)}' for w in windows]),
        "x-ratelimit-limit-requests": str(tightest.quota),
        "x-ratelimit-remaining-requests": str(tightest.remaining),
        "x-ratelimit-reset-requests": duration(tightest.wait_s or tightest.reset_s),
    }


def admitted_headers(subject: Subject, answer: Sequence[int]) -> bytes:
    """The same for an admission, straight from what admit.lua answered: what most requests need, and nothing else."""
    windows = subject.windows
    if not windows:
        return b""
    figures: list[int] = []
    least = quota = reset_us = 0
    for at, _, _, window_quota, _ in windows:
        window_left, window_reset_us = answer[at], answer[at + 1]
        figures += (window_left, -(-window_reset_us // MICROSECONDS))
        if len(figures) == 2 or window_left < least or (window_left == least and window_reset_us > reset_us):
            least, quota, reset_us = window_left, window_quota, window_reset_us
    return subject.headers % (*figures, quota, least, _reset(reset_us))


def token_headers(decision: TokenDecision) -> dict[str, str]:
    """`x-ratelimit-*-tokens`; none where there is no limit."""
    if not decision.quota:
        return {}
    return {
        "x-ratelimit-limit-tokens": str(decision.quota),
        "x-ratelimit-remaining-tokens": str(decision.remaining),
        "x-ratelimit-reset-tokens": duration(decision.wait_s or decision.reset_s),
    }


def duration(seconds: float) -> str:
    """A Go duration in whole milliseconds below a second, else in whole seconds; rounded up."""
    if seconds < 1:
        return f"{ceil(seconds * 1_000)}ms"
    minutes, rest = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h"] if hours else []
    if hours or minutes:
        parts.append(f"{minutes}m")
    return "".join(parts) + f"{rest}s"


def _reset(reset_us: int) -> bytes:
    if reset_us < MICROSECONDS:
        return duration(reset_us / MICROSECONDS).encode()
    return _whole(-(-reset_us // MICROSECONDS))


@lru_cache(maxsize=REMEMBERED_MAX)
def _whole(seconds: int) -> bytes:
    return duration(seconds).encode()
