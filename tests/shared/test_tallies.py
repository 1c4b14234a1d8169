"""Plain counters and histograms show what prometheus_client's show."""

import random

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from shared.tallies import PlainCounter, PlainHistogram

BUCKETS = (0.001, 0.5, 1, 2.5)


def shown(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)  # when a series began is not told


def test_they_show_the_same() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    counters: list[Counter | PlainCounter] = [
        Counter("a_total", "A.", ["x"], registry=theirs),
        PlainCounter("a_total", "A.", ["x"], registry=ours),
    ]
    spreads: list[Histogram | PlainHistogram] = [
        Histogram("b_seconds", "B.", ["x", "y"], buckets=BUCKETS, registry=theirs),
        PlainHistogram("b_seconds", "B.", ["x", "y"], buckets=BUCKETS, registry=ours),
    ]
    assert shown(theirs) == shown(ours)
    chance = random.Random(6)
    for _ in range(500):
        label, value = chance.choice("pq"), chance.choice((*BUCKETS, chance.random(), 0.0, 7.0))
        for counter in counters:
            counter.labels(label).inc()
        for spread in spreads:
            spread.labels(label, "z").observe(value)
    assert shown(theirs) == shown(ours)
