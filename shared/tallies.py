"""Counters and histograms as plain numbers, for what every request of a hot path counts.

prometheus_client's take a lock and several calls for each number: 4 µs of CPU a request at the gateway. These are for
one thread, and are read in the same one, at the scrape. What they show is the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        self.value += 1


class PlainCounter(Collector):
    """As prometheus_client's Counter with labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry) -> None:
        self._about = name, documentation, labels
        self._series: dict[tuple[str, ...], Count] = {}
        registry.register(self)

    def labels(self, *values: str) -> Count:
        return self._series.setdefault(values, Count())

    def collect(self) -> Iterable[Metric]:
        name, documentation, labels = self._about
        family = CounterMetricFamily(name, documentation, labels=labels)
        for values, count in self._series.items():
            family.add_metric(values, count.value)
        yield family


class Spread:
    """One series of a histogram: how many were at most each of the bounds, and not at most the one before."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class PlainHistogram(Collector):
    """As prometheus_client's Histogram with labels."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._about = name, documentation, labels
        self._bounds = tuple(buckets)
        self._names = [*map(repr, map(float, buckets)), "+Inf"]
        self._series: dict[tuple[str, ...], Spread] = {}
        registry.register(self)

    def labels(self, *values: str) -> Spread:
        return self._series.setdefault(values, Spread(self._bounds))

    def collect(self) -> Iterable[Metric]:
        name, documentation, labels = self._about
        family = HistogramMetricFamily(name, documentation, labels=labels)
        for values, spread in self._series.items():
            buckets = zip(self._names, map(float, accumulate(spread.counts)), strict=True)
            family.add_metric(values, list(buckets), spread.total)
        yield family
