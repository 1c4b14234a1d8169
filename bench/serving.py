"""make bench-serving: what a token costs on its way out.

Greedy requests by four paths: (engine) the bare engine in process, (http) llama.cpp's own HTTP server on the same
engine, (triton) our backend in Triton, (gateway) the whole path: key, limits, hold, flags, Triton, settlement. With two
models: chat-mini, which is so small that what is around the engine dominates, and one of 143 million weights, whose
engine does. Tokens are the engine's own count; TTFT is to the first content; CPU is of the processes behind the path
and of the load generator, per token generated.

What makes the paths comparable:
- one configuration: the bare engine is made by the backend's code from the build's config.pbtxt (threads, slots,
  context, batches, caches); one customer may use every slot, as the bare engine's callers may;
- the same questions of one customer, every request with letters of its own in front, so that no prompt is in any cache
  beyond the template's head, which each slot keeps on every path (one that goes over to another customer computes it
  anew: 5 of about 24 tokens, 16 ms of the large model's). Letters, as numbers in turn begin alike: the bare engine,
  which looks for the slot most alike, then computed 1 to 3 tokens, 3 to 9 ms, less than a path that does not. The
  lengths are the same (the end-of-text token is biased away), and differ from request to request;
- each path is warmed up; then rounds of all paths, in another order each time. A ratio is taken within each round, from
  what ran within seconds, and the median over the rounds counts; `low` and `high` are the rounds' extremes;
- a round begins with as many requests at once as there may be. They are computed together, and their times to the first
  token say in which order they happened to come; so TTFT is that of the others, which come when one has ended.

Where it goes: `end_p50_ms` is from the last content to the end, `of_ttft_ms` the mean time to the first token by stage
(bench/stages.py), and `beside` the bare engine beside a process that takes as much of a processor as the whole path
does around the engine, and only counts.

None of this helps on a machine that does other things too: Linux does not give two processes the same share of a busy
processor, though they do the same (seen: 22 to 58 tokens/s of the bare engine beside 70 to 96 through Triton, at the
same processor time a token). What others took is in the result as `others_share`; with more than 5 %, measure again.

`--rounds` (default 3) sets how long it takes: about 8 minutes with the default, on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench import models, report, stack, stages
from bench.clients import BareEngine, Customer, Drive, Http, Result, Triton, customer
from bench.processes import Cpu, machine_s
from services.inference.backend.gguf import read_head

QUESTIONS = (
    "Tell me about Tollgate in detail.",
    "Explain the life of a request.",
    "Write a long introduction to Tollgate.",
    "How do limits work?",
    "What happens to my credits when I hang up?",
    "How do I roll out a new build?",
)
ROUNDS = 3
WARM_UP_REQUESTS = 16
OTHERS_SHARE_MAX = 0.05
NEVER = -100
PATHS = ("engine", "http", "triton", "gateway")
BESIDE = "beside"


@dataclass(frozen=True)
class Load:
    """A model and what is asked of it. `tokens`: of the shortest and the longest answer; `requests`: concurrency →
    requests of one round."""

    alias: str
    build: str
    tokens: tuple[int, int]
    requests: Mapping[int, int]
    compared_with: str
    ratio_min: float
    ttft_more_max_ms: float | None = None

    def bodies(self, numbers: Sequence[int], end: int) -> list[dict[str, Any]]:
        """A request for each number; `end` is the token that would end an answer."""
        return [
            {
                "model": self.alias,
                "messages": [{"role": "user", "content": f"{letters(n)} {QUESTIONS[n % len(QUESTIONS)]}"}],
                "temperature": 0,
                "max_tokens": self.length(n),
                "logit_bias": {str(end): NEVER},
            }
            for n in numbers
        ]

    def length(self, number: int) -> int:
        """Tokens of an answer: spread evenly, the same in every round of as many requests."""
        shortest, longest = self.tokens
        return shortest + number % len(QUESTIONS) * (longest - shortest) // (len(QUESTIONS) - 1)


LOADS = (
    Load("chat-mini", "chat-mini-q8_0", (96, 160), {1: 12, 4: 24, 16: 48}, "http", 0.6),
    Load(models.BIG, models.BIG, (32, 96), {1: 6, 4: 16, 16: 32}, "engine", 0.95, ttft_more_max_ms=10),
)


@dataclass
class Series:
    """What one path did at one concurrency, round by round."""

    results: list[list[Result]] = field(default_factory=list)
    walls_s: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    others_s: float = 0.0
    """Processor time of programs that have nothing to do with the bench."""
    observed: stages.Sums = field(default_factory=dict)

    def add(self, results: list[Result], wall_s: float, cpu: Cpu, others_s: float) -> None:
        self.results.append(results)
        self.walls_s.append(wall_s)
        self.others_s += max(0.0, others_s)
        for name, seconds in cpu.seconds.items():
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + seconds

    @property
    def speeds(self) -> list[float]:
        """Tokens a second, of each round."""
        return [_tokens(r) / wall_s for r, wall_s in zip(self.results, self.walls_s, strict=True)]

    @property
    def all(self) -> list[Result]:
        return [result for results in self.results for result in results]

    @property
    def share_around(self) -> float:
        """Of one processor: what everything but the engine's own process took."""
        return sum(seconds for name, seconds in self.cpu_s.items() if name != "backend") / sum(self.walls_s)

    def ttft_s(self, concurrency: int) -> list[float]:
        """Of the requests that no others began together with."""
        return [r["ttft_s"] for results in self.results for r in results[concurrency:]]


Measured = dict[tuple[str, int, str], Series]
"""By model, concurrency and path."""


@dataclass
class Bench:
    """A running stack with a customer, and where its models are."""

    environment: Mapping[str, str]
    repository: Path
    customer: Customer
    rounds: int
    used: int = 0

    def numbers(self, count: int) -> range:
        """Numbers that no request has had yet; they begin with the first question again."""
        start, self.used = self.used, self.used + -(-count // len(QUESTIONS)) * len(QUESTIONS)
        return range(start, start + count)

    async def measure(self, load: Load, found: Measured) -> None:
        """Every path at every concurrency."""
        state = Path(self.environment["TOLLGATE_STATE"])
        engine = await asyncio.to_thread(BareEngine, self.repository, load.build)
        # The engine's server closes a connection after some requests, without a word: each request has its own there.
        http = Http(engine.address, engine.key, keeps_alive=False)
        triton = Triton(self.environment["TRITON_GRPC_URL"], load.build, self.customer.tenant)
        gateway = Http(self.environment["TOLLGATE_URL"], self.customer.key, keeps_alive=True)
        paths: dict[str, Drive] = {
            "engine": engine.drive,
            "http": http.drive,
            "triton": triton.drive,
            "gateway": gateway.drive,
        }
        end = int(read_head(self.repository / load.build / "1/model.gguf").metadata["tokenizer.ggml.eos_token_id"])
        for path, drive in paths.items():
            results, _ = await drive(load.bodies(self.numbers(WARM_UP_REQUESTS), end), WARM_UP_REQUESTS)
            say(f"{load.alias}: {path} is warm; {_tokens(results) / WARM_UP_REQUESTS:.0f} tokens an answer")
        for concurrency, count in load.requests.items():

            async def once(path: str, drive: Drive, at: int = concurrency, requests: int = count) -> None:
                bodies = load.bodies(self.numbers(requests), end)
                before, busy_s = await self.observed(load), machine_s()
                with Cpu.of_stack(state) as behind, Cpu.of(engine.pid) as beside:
                    results, wall_s = await drive(bodies, at)
                others_s = machine_s() - busy_s - sum(behind.seconds.values()) - beside.seconds.get("engine", 0.0)
                series = found.setdefault((load.alias, at, path), Series())
                series.add(results, wall_s, behind if path in ("triton", "gateway") else beside, others_s)
                series.observed = stages.added(series.observed, before, await self.observed(load))

            for turn in range(self.rounds):
                for place in range(len(PATHS)):
                    path = PATHS[(place + turn) % len(PATHS)]
                    await once(path, paths[path])
                if load.compared_with == "engine":
                    with stages.Rival(found[load.alias, concurrency, "gateway"].share_around):
                        await once(BESIDE, engine.drive)
            speeds = {
                p: statistics.median(series.speeds)
                for (alias, at, p), series in found.items()
                if (alias, at) == (load.alias, concurrency)
            }
            say(
                f"{load.alias} at {concurrency}: " + ", ".join(f"{p} {s:,.0f}" for p, s in speeds.items()) + " tokens/s"
            )
        for connection in (http, triton, gateway):
            await connection.close()
        engine.close()

    async def observed(self, load: Load) -> stages.Sums:
        """What chat and the backend have observed of the load's build."""
        return await asyncio.to_thread(stages.read, self.environment, load.build)


def say(line: str) -> None:
    """Progress, for a person, with the seconds since the bench began."""
    print(f"{time.perf_counter() - STARTED_S:6.1f} s  {line}", file=sys.stderr, flush=True)


STARTED_S = time.perf_counter()


def letters(number: int) -> str:
    """Six of them that look like chance, the same for the same number."""
    return "".join(chr(ord("a") + byte % 26) for byte in hashlib.blake2b(number.to_bytes(8), digest_size=6).digest())


def _tokens(results: Sequence[Result]) -> float:
    return sum(result["output_tokens"] for result in results)


async def measure(environment: Mapping[str, str], repository: Path, rounds: int) -> Measured:
    """Every model by every path."""
    somebody = await customer(environment["TOLLGATE_URL"], environment["TOLLGATE_ADMIN_TOKEN"])
    bench, found = Bench(environment, repository, somebody, rounds), Measured()
    for load in LOADS:
        await bench.measure(load, found)
    return found


def others_share(found: Measured) -> float:
    """How much of the processors' time went to programs that have nothing to do with the bench."""
    series = [s for (_, _, path), s in found.items() if path != BESIDE]  # the rival is one of the others
    return sum(s.others_s for s in series) / (sum(sum(s.walls_s) for s in series) * (os.cpu_count() or 1))


def figures(found: Measured) -> list[dict[str, Any]]:
    """The table, a row for each series."""
    rows = []
    for (model, concurrency, path), series in found.items():
        results, tokens = series.all, _tokens(series.all)
        ttft_s = series.ttft_s(concurrency)
        spoken_s = [r.get("spoken_s", r["duration_s"]) for r in results]  # the bare engine has nothing to say after it
        spread_s = [(s - r["ttft_s"]) / max(1, r["output_tokens"] - 1) for s, r in zip(spoken_s, results, strict=True)]
        rest_s = [r["duration_s"] - s for s, r in zip(spoken_s, results, strict=True)]
        per_token_us = {name: round(seconds / tokens * 1e6, 1) for name, seconds in series.cpu_s.items()}
        stages_ms = {}
        if path in ("triton", "gateway"):
            mean_s = statistics.fmean(r["ttft_s"] for r in results)
            stages_ms = stages.split_ms(mean_s, series.observed, has_chat=path == "gateway")
        rows.append(
            {
                "model": model,
                "path": path,
                "at": concurrency,
                "ttft_p50_ms": report.percentile(ttft_s, 0.5) * 1000,
                "ttft_p99_ms": report.percentile(ttft_s, 0.99) * 1000,
                "per_token_p50_ms": report.percentile(spread_s, 0.5) * 1000,
                "end_p50_ms": report.percentile(rest_s, 0.5) * 1000,
                "tokens": int(tokens),
                "tokens_per_s": statistics.median(series.speeds),
                "low": min(series.speeds),
                "high": max(series.speeds),
                "cpu_us_per_token": sum(per_token_us.values()),
                "of_it": per_token_us,
                "of_ttft_ms": stages_ms,
            }
        )
    return rows


def aims(found: Measured) -> list[dict[str, Any]]:
    """Where the whole path should stand beside the bare engine and llama.cpp's own server."""
    rows = []
    for load in LOADS:
        for concurrency in load.requests:
            ours = found[load.alias, concurrency, "gateway"]
            other = found[load.alias, concurrency, load.compared_with]
            ratio = statistics.median(a / b for a, b in zip(ours.speeds, other.speeds, strict=True))
            name = f"{load.alias} at {concurrency}: whole path / {load.compared_with}, tokens/s"
            rows.append(report.aim(name, ratio, f">= {load.ratio_min}", met=ratio >= load.ratio_min))
            if (most_ms := load.ttft_more_max_ms) is not None:
                more_ms = (
                    statistics.median(ours.ttft_s(concurrency)) - statistics.median(other.ttft_s(concurrency))
                ) * 1000
                name = f"{load.alias} at {concurrency}: TTFT p50 over the bare engine's, ms"
                rows.append(report.aim(name, more_ms, f"<= {most_ms:g}", met=more_ms <= most_ms))
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each path (default %(default)s)")
    rounds = arguments.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-models-") as folder:
        repository = Path(folder) / "models"
        models.repository(repository)
        say("the models are made")
        with stack.running(TOLLGATE_MODEL_REPOSITORY=str(repository)) as environment:
            found = uvloop.run(measure(environment, repository, rounds))
    others = others_share(found)
    report.write("serving", figures(found), aims(found), rounds=rounds, others_share=round(others, 3))
    if others > OTHERS_SHARE_MAX:
        print(f"NO USE: others took {others:.0%} of the processors meanwhile; see the first lines of bench/serving.py")


if __name__ == "__main__":
    main()
