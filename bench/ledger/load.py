"""Load: clients that each hold and settle in turn, or pairs that arrive at a rate whatever the answers do."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from uuid import UUID

from bench.ledger.spent import Spent
from bench.report import percentile

OPERATIONS_PER_PAIR = 2
CHOICES = 65_536

Pair = Callable[[UUID], Awaitable[None]]


@dataclass(slots=True)
class Result:
    """Of one load. `pair_ms` are the latencies of hold and settlement together."""

    pairs: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    server: Spent = field(default_factory=Spent)
    pair_ms: list[float] = field(default_factory=list)

    @property
    def operations(self) -> int:
        return self.pairs * OPERATIONS_PER_PAIR

    @property
    def operations_per_s(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def cpu_us_per_pair(self) -> float:
        """Processor time of this process."""
        return self.cpu_s / self.pairs * 1e6 if self.pairs else 0.0

    @property
    def cpu_us_per_operation(self) -> float:
        """Processor time of this process and of the database: what a busy machine does not blur."""
        return (self.cpu_s + self.server.cpu_s) / self.operations * 1e6 if self.pairs else 0.0

    def latency_ms(self, share: float) -> float:
        return percentile(self.pair_ms, share)


class Popularity:
    """Wallets as they come: by Zipf's law with exponent 1, or all alike."""

    def __init__(self, wallets: Sequence[UUID], *, zipf: bool, seed: int = 1) -> None:
        rng = random.Random(seed)
        weights = list(accumulate(1 / rank for rank in range(1, len(wallets) + 1))) if zipf else None
        self._sequence = rng.choices(wallets, cum_weights=weights, k=CHOICES)
        self._next = 0

    def wallet(self) -> UUID:
        """The next one. Drawn beforehand: the draw is not what is measured."""
        self._next = (self._next + 1) % CHOICES
        return self._sequence[self._next]


async def closed(
    pair: Pair,
    popularity: Popularity,
    *,
    clients: int,
    seconds: float,
    server: Callable[[], Spent],
    warm_up_s: float = 2.0,
) -> Result:
    """So many clients, each with one pair at a time. What happens in the first `warm_up_s` does not count."""
    result, counting, stopping = Result(), False, False

    async def client() -> None:
        while not stopping:
            began_s = time.perf_counter()
            await pair(popularity.wallet())
            if counting:
                result.pairs += 1
                result.pair_ms.append((time.perf_counter() - began_s) * 1e3)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
        await asyncio.sleep(warm_up_s)
        of_server, began_s, cpu_s, counting = server(), time.perf_counter(), _cpu_s(), True
        await asyncio.sleep(seconds)
        counting = False
        result.seconds, result.cpu_s = time.perf_counter() - began_s, _cpu_s() - cpu_s
        result.server = server() - of_server
        stopping = True
    return result


async def opened(pair: Pair, popularity: Popularity, *, pairs_per_s: float, seconds: float) -> Result:
    """Pairs that arrive at random at that mean rate; latency counts from the moment at which one was due."""
    rng, result = random.Random(2), Result()
    began_s = time.perf_counter()
    due_s = began_s
    cpu_s = _cpu_s()

    async def one(due_s: float) -> None:
        await pair(popularity.wallet())
        result.pairs += 1
        result.pair_ms.append((time.perf_counter() - due_s) * 1e3)

    async with asyncio.TaskGroup() as group:
        while due_s - began_s < seconds:
            wait_s = due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            group.create_task(one(due_s))
            due_s += rng.expovariate(pairs_per_s)
    result.seconds, result.cpu_s = time.perf_counter() - began_s, _cpu_s() - cpu_s
    return result


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
