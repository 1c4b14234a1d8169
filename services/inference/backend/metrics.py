"""Metrics of one build, kept in plain numbers and pushed to Triton now and then.

Each push is a round trip to the server's process, and the server crashes when pushes come from several
threads: so the dispatcher alone owns this object, and pushes when it is otherwise idle.
"""

from typing import Any

import triton_python_backend_utils as pb_utils

TTFT_BUCKETS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
QUEUE_WAIT_BUCKETS_S = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0]
TIME_PER_TOKEN_BUCKETS_S = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25]

GAUGES = {
    "queue_depth": "Requests that wait for a slot",
    "slots": "Requests that the engine can generate at once",
    "slots_busy": "Requests that are being generated",
    "kv_tokens": "Tokens that the requests being generated hold in the KV cache",
    "kv_tokens_max": "Tokens that the KV cache has room for",
}
COUNTERS = {
    "requests_total": "Requests that ended, however they ended",
    "prompt_tokens_total": "Prompt tokens of started requests, cached ones included",
    "cached_tokens_total": "Prompt tokens that came from the engine's prompt cache",
    "completion_tokens_total": "Tokens generated",
    "cancelled_total": "Requests that the caller cancelled",
}
HISTOGRAMS = {
    "queue_wait_seconds": ("From arrival to a slot", QUEUE_WAIT_BUCKETS_S),
    "ttft_seconds": ("From arrival to the first token", TTFT_BUCKETS_S),
    "time_per_token_seconds": ("Mean time between the tokens of one request", TIME_PER_TOKEN_BUCKETS_S),
}
ERRORS = "errors_total"


class EngineMetrics:
    """`tollgate_engine_*`, labelled with the build. One thread only."""

    def __init__(self, build: str) -> None:
        self._labels = {"build": build}
        kinds = pb_utils.MetricFamily
        self._families: list[Any] = []
        self._metrics: dict[str, Any] = {}
        for name, text in GAUGES.items():
            self._add(name, text, kinds.GAUGE)
        for name, text in COUNTERS.items():
            self._add(name, text, kinds.COUNTER)
        for name, (text, buckets) in HISTOGRAMS.items():
            self._add(name, text, kinds.HISTOGRAM, buckets=buckets)
        self._errors = self._family(ERRORS, "Requests that ended with an error, by code", kinds.COUNTER)
        self._pushed: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._increments: dict[str, float] = {}
        self._observations: list[tuple[str, float]] = []

    def set(self, name: str, value: float) -> None:
        self._gauges[name] = value

    def add(self, name: str, amount: float = 1) -> None:
        if amount:
            self._increments[name] = self._increments.get(name, 0) + amount

    def error(self, code: str) -> None:
        self.add(f"{ERRORS}:{code}")

    def observe(self, name: str, seconds: float) -> None:
        self._observations.append((name, seconds))

    def push(self) -> None:
        """Send what has changed since the last push."""
        for name, value in self._gauges.items():
            if self._pushed.get(name) != value:
                self._metrics[name].set(value)
                self._pushed[name] = value
        for name, amount in self._increments.items():
            self._counter(name).increment(amount)
        for name, seconds in self._observations:
            self._metrics[name].observe(seconds)
        self._increments.clear()
        self._observations.clear()

    def _counter(self, name: str) -> Any:
        metric = self._metrics.get(name)
        if metric is None:
            code = name.removeprefix(f"{ERRORS}:")
            metric = self._errors.Metric(labels={**self._labels, "code": code})
            self._metrics[name] = metric
        return metric

    def _add(self, name: str, text: str, kind: Any, **more: Any) -> None:
        self._metrics[name] = self._family(name, text, kind).Metric(labels=self._labels, **more)

    def _family(self, name: str, text: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=f"tollgate_engine_{name}", description=text, kind=kind)
        self._families.append(family)  # a family that is collected takes its metrics along
        return family
