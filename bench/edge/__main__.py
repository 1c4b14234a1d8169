"""`make bench-edge`: what the gateway costs a request and a streamed chunk, beside others, in one run.

One core has the contender, the others have everything else. Processor time a request, from /proc/PID/stat, is the
figure that holds on a busy machine; requests a second depend on the load's share as well. Two gateways share that core:
what a second one adds is the CPU a request that it costs more, since load and Redis have only the rest. Latency is what
a contender adds to the service itself, at 50 requests a second. Bodies are of different lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from bench import report
from bench.edge import contenders, others
from bench.edge.contenders import Contender, cpu_s
from bench.edge.stores import running as stores_running
from bench.stack import ROOT

CONNECTIONS = 32
STREAMS = 32
GAP_MS = 10
PACED_RATE = 50
PAIR = "tollgate x 2"
ROUNDS = 2


def load(contender: Contender, **job: Any) -> dict[str, Any]:
    """Run the load against a contender; its report, with `cpu_s` of the contender meanwhile."""
    whole = {"urls": list(contender.urls), "headers": dict(contender.headers), "connections": CONNECTIONS, **job}
    before_s, store_before_s = contender.cpu_s(), cpu_s(contender.store_pids)
    ran = subprocess.run(
        [sys.executable, "-m", "bench.edge.load", json.dumps(whole)], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    result: dict[str, Any] = json.loads(ran.stdout)
    if result["others"]:
        raise RuntimeError(f"{contender.name} answered {result['others']}")
    store_s = cpu_s(contender.store_pids) - store_before_s
    return result | {"cpu_s": contender.cpu_s() - before_s, "store_cpu_s": store_s}


def measure(contender: Contender, seconds: float) -> dict[str, Any] | None:
    """One round of one contender; None when it answered nothing, from which no figure follows."""
    load(contender, mode="saturate", seconds=1.0)  # warm-up
    rss_before_mb = contender.rss_mb()
    full = load(contender, mode="saturate", seconds=seconds)
    chunks = int(seconds * 1000 / GAP_MS * 0.9)
    stream = load(contender, mode="stream", seconds=seconds, connections=STREAMS, chunks=chunks, gap_ms=GAP_MS)
    if not full["answers"] or not stream["events"]:
        print(f"{contender.name} answered nothing within {seconds} s: no figures", file=sys.stderr)
        return None
    paced = load(contender, mode="paced", seconds=2 * seconds, rate=PACED_RATE, connections=8)
    return {
        "path": contender.name,
        "requests_per_s": full["answers"] / full["seconds"],
        "cpu_us_request": 1e6 * full["cpu_s"] / full["answers"],
        "redis_cpu_us_request": 1e6 * full["store_cpu_s"] / full["answers"],
        "chunks_per_s": stream["events"] / stream["seconds"],
        "cpu_us_chunk": 1e6 * stream["cpu_s"] / stream["events"],
        "p50_ms": report.percentile(paced["latencies_ms"], 0.5),
        "p99_ms": report.percentile(paced["latencies_ms"], 0.99),
        "rss_mb": contender.rss_mb(),
        "rss_growth_mb": contender.rss_mb() - rss_before_mb,
    }


def best(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several rounds each figure's best: what disturbs a measurement only ever adds."""
    rows = {key: min(row[key] for row in rounds) for key in rounds[0]}
    return rows | {key: max(row[key] for row in rounds) for key in ("requests_per_s", "chunks_per_s", "rss_mb")}


def with_added_latency(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Latencies as what is added to asking the service directly."""
    itself = next(row for row in rows if row["path"] == "direct")
    found = []
    for row in rows:
        added = {f"added_{name}": max(0.0, row[name] - itself[name]) for name in ("p50_ms", "p99_ms")}
        found.append({key: value for key, value in row.items() if key not in ("p50_ms", "p99_ms")} | added)
    return found


def aims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where ours should stand beside the others."""
    by_path = {row["path"]: row for row in rows}
    ours = by_path["tollgate"]
    found = []

    def below(name: str, key: str, path: str, factor: float) -> None:
        if path in by_path:
            ratio = ours[key] / by_path[path][key]
            found.append(report.aim(f"{name} / {path}", ratio, f"<= {factor}", met=ratio <= factor))

    below("CPU a request", "cpu_us_request", "nginx auth_request", 1.0)
    below("CPU a request", "cpu_us_request", "bare relay", 0.5)
    below("CPU a chunk", "cpu_us_chunk", "nginx", 1.3)
    below("CPU a request", "cpu_us_request", "sglang-router", 1.0)
    if "sglang-router" in by_path:
        ratio = ours["requests_per_s"] / by_path["sglang-router"]["requests_per_s"]
        found.append(report.aim("requests/s / sglang-router", ratio, "> 1", met=ratio > 1))
    if PAIR in by_path:
        ratio = 2 * ours["cpu_us_request"] / by_path[PAIR]["cpu_us_request"]
        found.append(report.aim("two gateways / one, by CPU a request", ratio, ">= 1.8", met=ratio >= 1.8))
    below("CPU a request", "cpu_us_request", "litellm, no database", 1 / 200)
    for key, bound in (("added_p50_ms", 0.5), ("added_p99_ms", 2.0), ("rss_growth_mb", 8.0)):
        found.append(report.aim(key, ours[key], f"<= {bound}", met=ours[key] <= bound))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.edge", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--only", default="", help="names of contenders, separated by semicolons")
    parser.add_argument("--with-litellm", action="store_true", help="fetch LiteLLM's proxy and measure it too")
    parser.add_argument("--with-sglang", action="store_true", help="fetch sglang-router and measure it too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped
    own, rest = contenders.cores()
    os.sched_setaffinity(0, rest)
    with ExitStack() as stack:
        stores = stack.enter_context(stores_running())
        service = stack.enter_context(contenders.service(rest))
        makers: dict[str, Callable[[], AbstractContextManager[Contender]]] = {
            "direct": partial(contenders.direct, service),
            "tollgate": partial(contenders.gateway, own, service, stores),
            PAIR: partial(contenders.gateways, own, service, stores, 2),
            "bare relay": partial(contenders.bare, own, service),
        }
        binary = stack.enter_context(others.nginx_binary())
        if binary:
            makers["nginx"] = partial(contenders.nginx, own, service, binary, auth=False)
            makers["nginx auth_request"] = partial(contenders.nginx, own, service, binary, auth=True)
        if options.with_sglang:
            makers["sglang-router"] = partial(others.sglang_router, own, service)
        if options.with_litellm:
            makers["litellm, no database"] = partial(others.litellm, own, service)
        wanted = [name for name in options.only.split(";") if name] or list(makers)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in makers if name in {"direct", *wanted}}
        for number in range(ROUNDS):
            for name, row in rounds.items():
                with makers[name]() as contender:
                    if (figures := measure(contender, options.seconds)) is not None:
                        row.append(figures)
                print(f"round {number + 1}: {name}", file=sys.stderr)
    rows = with_added_latency([best(r) for r in rounds.values() if r])
    report.write("edge", rows, aims(rows) if rounds.get("tollgate") else [])


if __name__ == "__main__":
    main()
