"""make bench-auth: what sign-in costs beside bare argon2, and what a flood of sign-ins does to everybody else.

- Logins a second through the service, beside the same argon2 in bare threads, in one run on one machine; the client and
  PostgreSQL share the cores, so that processor time per login is the figure to trust.
- Refresh and creation of keys, alone, and while FLOOD_PER_S sign-ins a second are offered, whatever becomes of them.
- Look-ups and lists from 10³ users to 10⁵; `--full`: to 10⁶, and the migrations of this release on 10⁶ users.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import aiohttp

from bench import report
from bench.auth import growth, service
from shared.identity import Identity

USERS = 1_000
BARE_S, LOGINS_S, ALONE_S, FLOOD_S = 4, 8, 6, 10
LOGIN_CLIENTS = 8
FLOOD_PER_S = 200
CALM_PER_S = 10  # refreshes, and creations of keys, each
SIZES, SIZES_FULL = [1_000, 10_000, 100_000], [1_000, 10_000, 100_000, 1_000_000]
TIMEOUT = aiohttp.ClientTimeout(total=60)

Row = dict[str, Any]


def bare(seconds: float) -> tuple[float, float]:
    """argon2 verifications a second in as many threads as the service has, and processor time of one, in ms."""
    hasher = service.hasher()
    stored = hasher.hash(service.PASSWORD)

    def verify_until(end: float) -> int:
        for count in itertools.count():
            if time.perf_counter() >= end:
                return count
            hasher.verify(stored, service.PASSWORD)
        raise AssertionError("unreachable")

    started, cpu_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(service.THREADS) as pool:
        done = sum(pool.map(verify_until, [started + seconds] * service.THREADS))
    return done / (time.perf_counter() - started), (time.process_time() - cpu_s) / done * 1000


class Client:
    """People at auth's own port, each from an address of their own."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self.statuses: Counter[int] = Counter()

    async def post(self, path: str, body: dict[str, Any], identity: Identity) -> dict[str, Any]:
        address = ".".join(str(random.randint(1, 250)) for _ in range(4))
        headers = {**service.header(identity), "x-forwarded-for": address}
        async with self._http.post(self._url + path, json=body, headers=headers) as answer:
            self.statuses[answer.status] += 1
            found: dict[str, Any] = await answer.json(content_type=None)
            return found

    async def login(self, number: int) -> dict[str, Any]:
        body = {"username": f"user-{number}", "password": service.PASSWORD}
        return await self.post("/api/v1/auth/login", body, Identity("anonymous"))

    async def refresh(self, token: str) -> str:
        found = await self.post("/api/v1/auth/refresh", {"refresh_token": token}, Identity("anonymous"))
        renewed: str = found["refresh_token"]
        return renewed

    async def create_key(self, identity: Identity) -> None:
        await self.post("/api/v1/keys", {"name": f"key {uuid4().hex[:8]}"}, identity)


async def logins(client: Client, running: service.Service) -> tuple[float, float]:
    """Logins a second by clients that wait for their answer, and the service's processor time of one, in ms."""
    numbers = itertools.cycle(range(1, USERS + 1))
    started, cpu_s = time.perf_counter(), running.cpu_s()
    done = 0

    async def one_after_another() -> None:
        nonlocal done
        while time.perf_counter() < started + LOGINS_S:
            await client.login(next(numbers))
            done += 1

    await asyncio.gather(*(one_after_another() for _ in range(LOGIN_CLIENTS)))
    return done / (time.perf_counter() - started), (running.cpu_s() - cpu_s) / done * 1000


async def paced(per_s: float, seconds: float, act: Callable[[], Awaitable[object]]) -> list[float]:
    """Begin an act at fixed times, whatever becomes of those before; the times from when each was due, in ms."""
    started = time.perf_counter()

    async def one(due_s: float) -> float:
        await asyncio.sleep(due_s - time.perf_counter())
        await act()
        return (time.perf_counter() - due_s) * 1000

    return list(await asyncio.gather(*(one(started + n / per_s) for n in range(int(per_s * seconds)))))


class Calm:
    """A few people who are signed in, and refresh and make keys."""

    def __init__(self, client: Client, people: list[tuple[str, Identity]]) -> None:
        self._client = client
        self._identities = [identity for _, identity in people]
        self._tokens = [token for token, _ in people]

    async def refresh(self) -> None:
        self._tokens.append(await self._client.refresh(self._tokens.pop(0)))

    async def create_key(self) -> None:
        await self._client.create_key(random.choice(self._identities))

    async def measure(self, seconds: float, when: str) -> list[Row]:
        refreshes, keys = await asyncio.gather(
            paced(CALM_PER_S, seconds, self.refresh), paced(CALM_PER_S, seconds, self.create_key)
        )
        return [_row(f"refresh, {when}", refreshes), _row(f"create a key, {when}", keys)]


def _row(what: str, times: list[float]) -> Row:
    p50, p99 = report.percentile(times, 0.5), report.percentile(times, 0.99)
    return {"what": what, "n": len(times), "p50_ms": p50, "p99_ms": p99}


async def people(client: Client, owner_url: str, count: int) -> list[tuple[str, Identity]]:
    """Signed in: refresh token, and who they are."""
    connection = await service.connect(owner_url)
    found = []
    try:
        for number in range(1, count + 1):
            tokens = await client.login(number)
            user_id, org_id = await service.ids(connection, number)
            session = await connection.fetchval(
                "SELECT id FROM auth.session WHERE user_id = $1 ORDER BY id DESC LIMIT 1", user_id
            )
            scopes = ("keys:write", "chat", "models", "inference", "billing:read")
            identity = Identity(
                "user", user_id=str(user_id), org_id=str(org_id), session_id=str(session), scopes=scopes
            )
            found.append((tokens["refresh_token"], identity))
    finally:
        await connection.close()
    return found


async def measure(running: service.Service, owner_url: str, bare_ms: float) -> tuple[list[Row], Row, list[Row]]:
    """Logins; refresh and keys, alone and in a flood; what became of the flood."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT) as http:
        client = Client(http, running.url)
        per_s, cpu_ms = await logins(client, running)
        login = {"logins_per_s": per_s, "cpu_ms_of_login": cpu_ms, "cpu_ms_of_argon2": bare_ms}
        calm = Calm(client, await people(client, owner_url, 64))
        alone = await calm.measure(ALONE_S, "alone")
        flood = Client(http, running.url)
        numbers = itertools.cycle(range(100, USERS + 1))
        offered, during = await asyncio.gather(
            paced(FLOOD_PER_S, FLOOD_S, lambda: flood.login(next(numbers))), calm.measure(FLOOD_S, "in a flood")
        )
    outcomes = {str(status): count for status, count in sorted(flood.statuses.items())}
    became = {"offered_per_s": FLOOD_PER_S, "offered": len(offered), **outcomes}
    return [*alone, *during], login, [became]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.auth", description=__doc__)
    parser.add_argument("--full", action="store_true", help="to 10⁶ users, and the migrations on as many")
    full = parser.parse_args().full
    with service.stores() as stores:
        owner_url = stores.database("bench")
        service.migrate(owner_url)
        sizes = asyncio.run(growth.lookups(owner_url, SIZES_FULL if full else SIZES))
        bare_per_s, bare_ms = bare(BARE_S)
        with service.serving(owner_url, stores.redis_url) as running:
            latencies, login, flood = asyncio.run(measure(running, owner_url, bare_ms))
        migrated = [growth.migrations(stores, SIZES_FULL[-1] if full else SIZES[-1])]
    login |= {"argon2_per_s": bare_per_s, "threads": service.THREADS}
    print(report.table([login]), report.table(flood), report.table(sizes), report.table(migrated), sep="\n\n")
    in_flood = max(row["p99_ms"] for row in latencies if row["what"].endswith("in a flood"))
    slowest, wait_ms = max(row["p95_ms"] for row in sizes), migrated[0]["longest_wait_ms"]
    share = login["cpu_ms_of_argon2"] / login["cpu_ms_of_login"]
    ratio = login["logins_per_s"] / bare_per_s
    lookup, lock = growth.LOOKUP_BOUND_MS, growth.LOCK_BOUND_MS
    aims = [
        report.aim("logins a second, of bare argon2's", ratio, ">= 0.9", ratio >= 0.9),
        report.aim("argon2's share of a login's processor time", share, "no bound", True),
        report.aim("p99 of refresh and keys in a flood, ms", in_flood, "< 300", in_flood < 300),
        report.aim("p95 of look-ups and lists, ms", slowest, f"< {lookup}", slowest < lookup),
        report.aim("longest wait for a migration, ms", wait_ms, f"< {lock}", wait_ms < lock),
    ]
    report.write("auth", latencies, aims, login=login, flood=flood, growth=sizes, migrations=migrated)


if __name__ == "__main__":
    main()
