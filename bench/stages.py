"""Where a path's time goes: the first token's, by the histograms of those on the way; the engine's, by a rival.

The client's mean is split at the moments that chat and the backend observe themselves:

    client ──gateway── chat ──chat──► backend ──queue── slot ──prompt──► first token (and all the way back)

`Rival` takes as much of a processor as a path's other processes do, and only counts: what the bare engine still makes
beside it is what any relay of that cost would leave on this machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from types import TracebackType

METRICS_TIMEOUT_S = 10
SHARE_MAX = 0.9  # of one processor
_RIVAL = """
import sys, time
share, slice_s = float(sys.argv[1]), 0.0002
while True:
    until_s = time.perf_counter() + slice_s
    while time.perf_counter() < until_s:
        pass
    time.sleep(slice_s * (1 - share) / share)
"""
_HISTOGRAMS = {
    "chat": ("TOLLGATE_CHAT_HTTP_URL", "/metrics", "tollgate_chat_time_to_first_token_seconds"),
    "backend": ("TRITON_METRICS_URL", "", "tollgate_engine_ttft_seconds"),
    "queue": ("TRITON_METRICS_URL", "", "tollgate_engine_queue_wait_seconds"),
}

Sums = dict[str, tuple[float, float]]
"""Seconds and observations, by histogram."""


def read(environment: Mapping[str, str], build: str) -> Sums:
    """What was observed of a build so far."""
    found: Sums = {}
    for name, (variable, path, histogram) in _HISTOGRAMS.items():
        url = environment[variable] + path
        with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as answer:
            text = answer.read().decode()
        line = rf'^{histogram}_%s\{{[^}}]*build="{re.escape(build)}"[^}}]*\}} (\S+)$'
        seconds, count = (sum(map(float, re.findall(line % kind, text, re.MULTILINE))) for kind in ("sum", "count"))
        found[name] = seconds, count
    return found


def added(total: Sums, before: Sums, after: Sums) -> Sums:
    """With what was observed between two readings."""
    nothing = (0.0, 0.0)
    return {
        name: (
            total.get(name, nothing)[0] + after[name][0] - before[name][0],
            total.get(name, nothing)[1] + after[name][1] - before[name][1],
        )
        for name in after
    }


def split_ms(client_s: float, observed: Sums, *, has_chat: bool) -> dict[str, float]:
    """A client's mean time to the first token by stage, in milliseconds."""
    means = {name: seconds / max(1.0, count) for name, (seconds, count) in observed.items()}
    before_backend = {"client": client_s - means["backend"]}
    if has_chat:
        before_backend = {"gateway": client_s - means["chat"], "chat": means["chat"] - means["backend"]}
    stages_s = {**before_backend, "queue": means["queue"], "prompt": means["backend"] - means["queue"]}
    return {name: round(seconds * 1000, 2) for name, seconds in stages_s.items()}


class Rival:
    """A process that takes `share` of a processor inside the block, in slices as short as a relay's."""

    def __init__(self, share: float) -> None:
        self._share = min(share, SHARE_MAX)

    def __enter__(self) -> Rival:
        self._process = subprocess.Popen((sys.executable, "-c", _RIVAL, str(self._share)), start_new_session=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
