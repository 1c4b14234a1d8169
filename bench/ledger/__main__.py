"""`python -m bench.ledger [--full] [--seconds N] [--json]`: see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psutil
import uvloop

from bench import report
from bench.ledger import books, load, targets, tpcb
from bench.ledger.server import MODEL, Server, running

CLIENTS = 512
IN_FLIGHT_MAX = 100_000
WALLETS = (1_000, 10_000, 100_000)
WALLETS_FULL = (*WALLETS, 1_000_000)
TRANSFERS = (100_000, 500_000)
TRANSFERS_FULL = (100_000, 1_000_000, 10_000_000)
FLAT = 1.5
COMPARED_WALLETS = 100_000

Target = Callable[[], AbstractAsyncContextManager[load.Pair]]


@dataclass(slots=True)
class Bench:
    """One run; `figures` and `aims` grow."""

    server: Server
    seconds: float
    is_full: bool
    wallets: list[UUID] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    aims: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """All but `run_transfers`, in the order in which the books grow; what is compared, side by side."""
        self._kernel()
        self._sizes("wallets", WALLETS_FULL if self.is_full else WALLETS, self._with_wallets)
        tpcb_10 = self._tpcb(10)
        zipf = self._writer("writer + database, 100,000 wallets, zipf", self._popular())
        grpc = self._end_to_end()
        tpcb_1 = self._tpcb(1)
        hot = self._writer("writer + database, one wallet", self._popular(1))
        self._aim("writer with database / pgbench -s 10", zipf / tpcb_10, 3)
        self._aim("writer with database, one wallet / pgbench -s 1", hot / tpcb_1, 10)
        self._aim("end to end over gRPC / pgbench -s 10", grpc / tpcb_10, 1.5)

    def run_transfers(self, server: Server) -> None:
        """How an operation grows with the transfers, on a server of its own: the other loads leave some 10⁵ behind.

        Each wallet's grant is a transfer, so that there are as many as wallets at first.
        """
        self.server, self.wallets = server, []
        self._with_wallets(COMPARED_WALLETS)
        self._sizes("transfers", TRANSFERS_FULL if self.is_full else TRANSFERS, self._with_transfers)

    def _tpcb(self, scale: int) -> float:
        say(f"pgbench -s {scale}")
        found = tpcb.run(self.server, scale, int(self.seconds))
        self._figure(f"pgbench TPC-B -s {scale} -c {tpcb.CLIENTS}", found.tps, tpcb=found)
        return found.tps

    def _kernel(self) -> None:
        say("kernel")
        rate = targets.kernel_pairs_per_s(min(self.seconds, 3)) * load.OPERATIONS_PER_PAIR
        self._figure("kernel alone", rate)

    def _writer(self, name: str, popularity: load.Popularity) -> float:
        say(name)
        self.server.settle_down()  # as pgbench begins, which has just vacuumed its tables
        found = self._closed(self._writer_target, popularity)
        half = self._half_load(self._writer_target, popularity, found)
        self.server.check()
        self._figure(name, found.operations_per_s, found, half)
        return found.operations_per_s

    def _end_to_end(self) -> float:
        name = "end to end over gRPC, 100,000 wallets, zipf"
        say(name)
        self.server.settle_down()
        with self.server.billing() as (address, pid):
            billing = psutil.Process(pid)

            def target() -> AbstractAsyncContextManager[load.Pair]:
                return targets.end_to_end(address)

            before_s = sum(billing.cpu_times()[:2])
            found = self._closed(target, self._popular())
            billing_us = (sum(billing.cpu_times()[:2]) - before_s) / max(found.pairs, 1) * 1e6
            half = self._half_load(target, self._popular(), found)
        self.server.check()
        self._figure(name, found.operations_per_s, found, half, billing_cpu_us=billing_us)
        cpu_us = found.cpu_us_per_pair
        self.aims.append(report.aim("CPU of a pair in the calling service, µs", cpu_us, "<= 150", cpu_us <= 150))
        return found.operations_per_s

    def _sizes(self, what: str, sizes: tuple[int, ...], grow: Callable[[int], None]) -> None:
        """The processor time of an operation, here and in the database, at each size."""
        costs = []
        for size in sizes:
            say(f"{size:,} {what}")
            grow(size)
            self.server.settle_down()
            found = self._closed(self._writer_target, load.Popularity(self.wallets, zipf=False))
            self.server.check()
            self._figure(f"writer + database, {size:,} {what}, all alike", found.operations_per_s, found)
            costs.append(found.cpu_us_per_operation)
        ratio = max(costs) / costs[0]
        name = f"CPU of an operation from {sizes[0]:,} to {sizes[-1]:,} {what}, greatest / first"
        self.aims.append(report.aim(name, ratio, f"<= {FLAT}", ratio <= FLAT))

    def _with_wallets(self, count: int) -> None:
        self.wallets += uvloop.run(books.add_wallets(self.server.superuser_url, count - len(self.wallets)))

    def _with_transfers(self, count: int) -> None:
        present = int(self.server.postgres.execute("SELECT sum(seq) FROM billing.wallet", database="tollgate"))
        if present < count:
            uvloop.run(books.add_requests(self.server.superuser_url, self.wallets, count - present, MODEL))

    def _popular(self, count: int = COMPARED_WALLETS, *, zipf: bool = True) -> load.Popularity:
        return load.Popularity(self.wallets[:count], zipf=zipf)

    def _writer_target(self) -> AbstractAsyncContextManager[load.Pair]:
        return targets.writer(self.server.url(), IN_FLIGHT_MAX)

    def _closed(self, target: Target, popularity: load.Popularity) -> load.Result:
        async def go() -> load.Result:
            async with target() as pair:
                return await load.closed(
                    pair, popularity, clients=CLIENTS, seconds=self.seconds, server=self.server.spent
                )

        return uvloop.run(go())

    def _half_load(self, target: Target, popularity: load.Popularity, found: load.Result) -> load.Result:
        rate = found.pairs / found.seconds / 2

        async def go() -> load.Result:
            async with target() as pair:
                return await load.opened(pair, popularity, pairs_per_s=rate, seconds=self.seconds)

        return uvloop.run(go())

    def _figure(
        self,
        name: str,
        operations_per_s: float,
        found: load.Result | None = None,
        half: load.Result | None = None,
        *,
        tpcb: tpcb.Found | None = None,
        billing_cpu_us: float | None = None,
    ) -> None:
        if tpcb is not None:
            server, cpu_us = tpcb.server, (tpcb.cpu_s + tpcb.server.cpu_s) * 1e6
        elif found is not None:
            server, cpu_us = found.server.each(found.operations), found.cpu_us_per_operation
        else:
            server, cpu_us = None, None
        row: dict[str, Any] = {
            "load": name,
            "ops_per_s": operations_per_s,
            "mean_ms": tpcb.mean_ms if tpcb else "",
            "pair_p50_ms": found.latency_ms(0.5) if found else "",
            "pair_p99_ms": found.latency_ms(0.99) if found else "",
            "half_p50_ms": half.latency_ms(0.5) if half else "",
            "half_p99_ms": half.latency_ms(0.99) if half else "",
            "cpu_us_op_all": cpu_us if cpu_us is not None else "",
            "pg_cpu_us_op": server.cpu_s * 1e6 if server else "",
            "wal_bytes_op": server.wal_bytes if server else "",
            "fsyncs_op": server.wal_fsyncs if server else "",
            "cpu_us_pair": found.cpu_us_per_pair if found else "",
            "billing_cpu_us_pair": billing_cpu_us if billing_cpu_us is not None else "",
        }
        self.figures.append(row)

    def _aim(self, name: str, value: float, least: float) -> None:
        self.aims.append(report.aim(name, value, f">= {least}", value >= least))


def say(what: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="up to 10^6 wallets and 10^7 transfers; about an hour")
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--json", action="store_true", help="print the JSON too")
    arguments = parser.parse_args()
    try:
        tpcb.find()
    except tpcb.PgbenchMissing as error:
        raise SystemExit(str(error)) from None
    with running() as server:
        bench = Bench(server, arguments.seconds, arguments.full)
        bench.run()
    with running() as server:
        bench.run_transfers(server)
    path = report.write("ledger", bench.figures, bench.aims, clients=CLIENTS, seconds=arguments.seconds)
    if arguments.json:
        print(json.dumps(json.loads(path.read_text()), indent=2))


if __name__ == "__main__":
    main()
