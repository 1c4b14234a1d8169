"""How a decision looks to clients.

`RateLimit` and `RateLimit-Policy` as in draft-ietf-httpapi-ratelimit-headers-11; `x-ratelimit-*-requests` as OpenAI's
clients read them, for the window with the fewest requests left, the reset as a Go duration (`31s`, `12ms`).
All resets say when the window begins to give something back.
"""

from __future__ import annotations

from math import ceil

from shared.limits.policy import Decision
from shared.limits.tokens import TokenDecision


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
