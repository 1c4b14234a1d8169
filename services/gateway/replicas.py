"""The replicas of a service: which one answers the next request, and which are left alone for a while.

    SERVING ──FAILURES_MAX in a row, or a refused connection──► OUT for 1, 2, 4 … 30 s ──time over──► TRIAL: one request
       ▲ ▲                                                       │                                     │ ok      │ not
       │ └───── a probe, where it was the connection ────────────┘                                     │         │
       └───────────────────────────────────────────────────────────────────────────────────────────────┘   OUT ◄─┘

A request goes to the replica with the fewest outstanding, in turn among equals. A failure is a connection that broke,
an answer that is no HTTP, or none in time; a status of 500 is an answer. With every replica OUT the service is
refused at once; only a replica that refused its latest connection is asked even then, when no other is left: to be
refused again costs next to nothing, and it may be back. Probes ask each replica's /healthz; one that misses
PROBES_MISSED_MAX of them is OUT as long as another is not. The list of replicas may change at any time: those that
stay keep their connections, those that go finish theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from services.gateway.heads import RawHeaders
from services.gateway.pool import Pool, UpstreamConnection
from shared.clock import Clock
from shared.errors import Unavailable
from shared.telemetry import GatewayMetrics, get_logger

log = get_logger(__name__)

FAILURES_MAX = 5
PROBES_MISSED_MAX = 3
OUT_MIN_S, OUT_MAX_S = 1.0, 30.0
WAITING_MAX = 1_000
PROBE_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """For each replica: how many connections, how long one may idle (shorter than the services' own keep-alive, so
    that they never hang up on a request that begins), and how long opening one, or waiting for a free one, may take."""

    connections_max: int = 1_024
    idle_max_s: float = 30.0
    connect_timeout_s: float = 1.0
    probe_timeout_s: float = 1.0


class Replica:
    """One process of a service, and what is thought of it."""

    def __init__(self, url: str, pool: Pool) -> None:
        self.url = url
        self.pool = pool
        self.answers = False  # its latest probe
        self._failures = 0
        self._out_until_s = float("-inf")
        self._out_s = 0.0
        self._was_refused = False
        self._was_refused_at_once = False
        self._is_on_trial = False
        self._probes_missed = 0

    def may_serve(self, now_s: float) -> bool:
        return not self._out_s or (now_s >= self._out_until_s and not self._is_on_trial)

    @property
    def refuses(self) -> bool:
        """It is out because nothing listened there."""
        return bool(self._out_s) and self._was_refused_at_once

    @property
    def seems_frozen(self) -> bool:
        return self._probes_missed >= PROBES_MISSED_MAX

    def returns_in_s(self, now_s: float) -> float:
        return max(0.0, self._out_until_s - now_s)

    def chosen(self) -> None:
        """A request goes to it."""
        if self._out_s:
            self._is_on_trial = True

    def succeeded(self) -> None:
        if self._failures or self._out_s:
            self._failures, self._out_s, self._is_on_trial = 0, 0.0, False

    def forgotten(self) -> None:
        """A request ended that says nothing about it: the client left."""
        self._is_on_trial = False

    def failed(self, now_s: float, *, is_refused: bool = False, at_once: bool = False) -> None:
        """A request failed; `is_refused`: no connection was to be had, `at_once`: without waiting for one."""
        self._failures += 1
        if is_refused or self._out_s or self._failures >= FAILURES_MAX:
            self._was_refused, self._was_refused_at_once = is_refused, at_once
            self._out_s = OUT_MIN_S if is_refused else min(max(OUT_MIN_S, 2 * self._out_s), OUT_MAX_S)
            self._out_until_s = now_s + self._out_s
            self._is_on_trial = False

    def probed(self, *, answers: bool) -> None:
        self.answers = answers
        self._probes_missed = 0 if answers else self._probes_missed + 1
        if answers and self._was_refused:
            self.succeeded()


class Upstream:
    """A service. `take` and `connect` give a connection of the best replica; its answer is told to that `Replica`."""

    def __init__(
        self, name: str, urls: Iterable[str], clock: Clock, settings: PoolSettings, metrics: GatewayMetrics
    ) -> None:
        self.name = name
        self.replicas: list[Replica] = []
        self._clock = clock
        self._settings = settings
        self._errors = metrics.upstream_errors
        self._turn = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.update(urls)

    def update(self, urls: Iterable[str]) -> None:
        """Have these replicas from now on. Raises ValueError for none, or for what is no URL; then nothing changes."""
        known = {replica.url: replica for replica in self.replicas}
        wanted = list(dict.fromkeys(url.strip().rstrip("/") for url in urls if url.strip()))
        replicas = [known.get(url) or Replica(url, self._pool(url)) for url in wanted]
        if not replicas:
            raise ValueError(f"the service {self.name} needs at least one http(s) URL")
        for url, replica in known.items():
            if url not in wanted:
                replica.pool.retire()
        self.replicas = replicas
        self._wake()

    def take(self) -> tuple[Replica, UpstreamConnection] | None:
        """An idle connection of the replica that is to answer next; None when one has to be opened."""
        replica = self._best(())
        if replica is None or (connection := replica.pool.take()) is None:
            return None
        replica.chosen()
        return replica, connection

    async def connect(self) -> tuple[Replica, UpstreamConnection]:
        """A connection of the best replica, else of the next best; waits for one while all are busy.

        Raises Unavailable.
        """
        ends_at_s = self._clock.monotonic_s() + self._settings.connect_timeout_s
        while True:
            if (found := await self._connect_once()) is not None:
                return found
            rest_s = ends_at_s - self._clock.monotonic_s()
            if rest_s <= 0 or len(self._waiting) >= WAITING_MAX:
                self._errors.labels(self.name, "full").inc()
                raise Unavailable(retry_after_s=1, detail=f"{self.name}: every connection is busy")
            await self._room(rest_s)

    async def fetch(self, path: str, *, bytes_max: int, timeout_s: float) -> tuple[int, bytes]:
        """GET a path for ourselves: status and body. Raises Unavailable."""
        try:
            async with asyncio.timeout(timeout_s):
                replica, connection = await self.connect()
                return await _Fetch(replica, connection, path, bytes_max).run()
        except TimeoutError as e:
            raise Unavailable(code="timeout", detail=f"{self.name}: no answer to GET {path}") from e

    async def probe(self) -> None:
        """Ask every replica whether it lives, and hang up on what idled too long."""
        now_s = asyncio.get_running_loop().time()
        for replica in self.replicas:
            replica.pool.close_idle(now_s)
        await asyncio.gather(*[self._probe(replica) for replica in self.replicas])

    def reachable(self) -> None:
        """Raise Unavailable unless a replica answered its latest probe: for /readyz."""
        if not any(replica.answers for replica in self.replicas):
            raise Unavailable(code="unreachable")

    def close(self) -> None:
        """Hang up on what is idle."""
        for replica in self.replicas:
            replica.pool.retire()

    def _pool(self, url: str) -> Pool:
        return Pool(
            url,
            connections_max=self._settings.connections_max,
            idle_max_s=self._settings.idle_max_s,
            on_room=self._wake,
        )

    def _best(self, tried: Iterable[Replica]) -> Replica | None:
        """The replica to use next, None when all are out, tried or full."""
        replicas = self.replicas
        if len(replicas) == 1:
            only = replicas[0]
            can = not tried and only.may_serve(self._clock.monotonic_s()) and not only.pool.is_full
            return only if can else None
        now_s = self._clock.monotonic_s()
        self._turn = (self._turn + 1) % len(replicas)
        in_turn = replicas[self._turn :] + replicas[: self._turn]
        fit = [r for r in in_turn if r not in tried and r.may_serve(now_s) and not r.pool.is_full]
        return min(fit, key=lambda r: (r.seems_frozen, r.pool.outstanding), default=None)

    def _last_resort(self, tried: Iterable[Replica]) -> Replica | None:
        """With all replicas out: one that refuses connections, if it was not asked yet."""
        now_s = self._clock.monotonic_s()
        left = [r for r in self.replicas if r not in tried]
        if any(r.may_serve(now_s) for r in left):
            return None
        return next((r for r in left if r.refuses and not r.pool.is_full), None)

    async def _connect_once(self) -> tuple[Replica, UpstreamConnection] | None:
        """None when all replicas that may serve are full. Raises Unavailable when there is none."""
        tried: list[Replica] = []
        while (replica := self._best(tried) or self._last_resort(tried)) is not None:
            replica.chosen()
            try:
                connection = replica.pool.take() or await replica.pool.open(self._settings.connect_timeout_s)
            except OSError as e:
                at_once = isinstance(e, ConnectionRefusedError)
                replica.failed(self._clock.monotonic_s(), is_refused=True, at_once=at_once)
                self._errors.labels(self.name, "refused").inc()
                tried.append(replica)
            except BaseException:
                replica.forgotten()
                raise
            else:
                return replica, connection
        now_s = self._clock.monotonic_s()
        if any(r.may_serve(now_s) for r in self.replicas if r not in tried):
            return None
        wait_s = min(r.returns_in_s(now_s) for r in self.replicas)
        raise Unavailable(retry_after_s=max(1.0, wait_s), detail=f"{self.name}: no replica serves")

    async def _probe(self, replica: Replica) -> None:
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                connection = await replica.pool.open(self._settings.probe_timeout_s)
                status, _ = await _Fetch(replica, connection, "/healthz", PROBE_BYTES_MAX, is_probe=True).run()
        except (OSError, TimeoutError, Unavailable):
            status = 0
        replica.probed(answers=status == 200)

    async def _room(self, timeout_s: float) -> None:
        """Wait until a connection may be free, at most so long."""
        free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(free)
        try:
            async with asyncio.timeout(timeout_s):
                await free
        except TimeoutError:
            self._leave(free)
        except asyncio.CancelledError:
            if not self._leave(free):
                self._wake()  # it was this one's turn: the next one's, then
            raise

    def _leave(self, free: asyncio.Future[None]) -> bool:
        """Whether it still waited."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(free)
            return True
        return False

    def _wake(self) -> None:
        while self._waiting:
            free = self._waiting.popleft()
            if not free.done():  # cancelled, and its task has not run yet
                free.set_result(None)
                return


class _Fetch:
    """A small GET of our own: a Receiver."""

    def __init__(
        self, replica: Replica, connection: UpstreamConnection, path: str, bytes_max: int, *, is_probe: bool = False
    ) -> None:
        self._replica = replica
        self._connection = connection
        self._bytes_max = bytes_max
        self._is_probe = is_probe
        self._head = b"GET %b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (
            path.encode(),
            replica.pool.authority,
            b"connection: close\r\n" if is_probe else b"",
        )
        self._status = 0
        self._body = bytearray()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> tuple[int, bytes]:
        self._connection.send(self, self._head, is_complete=True, is_last=self._is_probe)
        try:
            await self._done
        except BaseException:
            self._connection.abandon()
            self._replica.forgotten()
            raise
        if not self._is_probe:
            self._replica.succeeded()
        return self._status, bytes(self._body)

    def head(self, status: int, headers: RawHeaders, length: int | None) -> None:
        self._status = status

    def piece(self, data: bytes) -> None:
        self._body += data

    def flush(self) -> None:
        if len(self._body) > self._bytes_max:
            self._connection.abandon()
            self.lost("too much")

    def end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def lost(self, reason: str) -> None:
        if not self._done.done():
            self._done.set_exception(Unavailable(code="unreachable", detail=reason))

    def upstream_full(self, is_full: bool) -> None:
        """Nothing more is to be sent."""
