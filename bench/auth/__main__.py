"""make bench-auth: what sign-in costs beside bare argon2, and what a flood of sign-ins does to everybody else.

- Logins a second through the service, beside the same argon2 in as many bare threads, in turns; with as many threads as
  the service takes by default, one core less than there are, and with one on every core, where client and PostgreSQL
  find no core of their own. Processor time per login is the figure that a busy machine changes least.
- Refresh and creation of keys, alone, and while FLOOD_PER_S sign-ins a second are offered; what one of those costs that
  are turned away.
- Look-ups and lists from 10³ users to 10⁵; `--full`: to 10⁶, and the migrations of this release on 10⁶ users.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import aiohttp

from bench import report
from bench.auth import growth, service
from shared.identity import Identity

USERS = 1_000
ROUNDS, BARE_S, LOGINS_S, ALONE_S, FLOOD_S = 3, 3, 4, 6, 10
LOGIN_CLIENTS = 8
FLOOD_PER_S = 200
CALM_PER_S = 10  # refreshes, and creations of keys, each
SIZES, SIZES_FULL = [1_000, 10_000, 100_000], [1_000, 10_000, 100_000, 1_000_000]
TIMEOUT = aiohttp.ClientTimeout(total=60)
NO_ANSWER = 599  # a connection that broke, as on a machine that is too busy to keep it

Row = dict[str, Any]


def bare(seconds: float, threads: int) -> tuple[int, float]:
    """argon2 verifications in bare threads, and how long they took, in seconds."""
    hasher = service.hasher()
    stored = hasher.hash(service.PASSWORD)

    def verify_until(end: float) -> int:
        for count in itertools.count():
            if time.perf_counter() >= end:
                return count
            hasher.verify(stored, service.PASSWORD)
        raise AssertionError("unreachable")

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(verify_until, [started + seconds] * threads))
    return done, time.perf_counter() - started


class Client:
    """People at auth's own port, each from an address of their own."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self.statuses: Counter[int] = Counter()
        self.refused_ms: list[float] = []

    async def post(self, path: str, body: dict[str, Any], identity: Identity) -> dict[str, Any]:
        address = ".".join(str(random.randint(1, 250)) for _ in range(4))
        headers = {**service.header(identity), "x-forwarded-for": address}
        started = time.perf_counter()
        try:
            async with self._http.post(self._url + path, json=body, headers=headers) as answer:
                found: dict[str, Any] = await answer.json(content_type=None)
                status = answer.status
        except (aiohttp.ClientError, TimeoutError):
            found, status = {}, NO_ANSWER
        self.statuses[status] += 1
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.refused_ms.append((time.perf_counter() - started) * 1000)
        return found

    async def login(self, number: int) -> dict[str, Any]:
        body = {"username": f"user-{number}", "password": service.PASSWORD}
        return await self.post("/api/v1/auth/login", body, Identity("anonymous"))

    async def refresh(self, token: str) -> str | None:
        """The next token; None where there is none, as on a machine that is too busy to answer in time."""
        found = await self.post("/api/v1/auth/refresh", {"refresh_token": token}, Identity("anonymous"))
        return found.get("refresh_token")

    async def create_key(self, identity: Identity) -> None:
        await self.post("/api/v1/keys", {"name": f"key {uuid4().hex[:8]}"}, identity)


async def logins(client: Client, seconds: float) -> tuple[int, float]:
    """Logins of clients that wait for their answer, and how long they took, in seconds."""
    numbers = itertools.cycle(range(1, USERS + 1))
    started, done = time.perf_counter(), 0

    async def one_after_another() -> None:
        nonlocal done
        while time.perf_counter() < started + seconds:
            await client.login(next(numbers))
            done += 1

    await asyncio.gather(*(one_after_another() for _ in range(LOGIN_CLIENTS)))
    return done, time.perf_counter() - started


async def beside_bare(client: Client, running: service.Service, threads: int) -> Row:
    """Logins a second and bare argon2, in turns, so that both meet the same neighbours; processor time of a login."""
    await logins(client, 1)  # connections, caches
    done, took_s, bare_done, bare_s = 0, 0.0, 0, 0.0
    spent = service.Spent(0, 0)
    for _ in range(ROUNDS):
        verified, seconds = await asyncio.to_thread(bare, BARE_S, threads)
        bare_done, bare_s = bare_done + verified, bare_s + seconds
        before = running.spent()
        signed_in, seconds = await logins(client, LOGINS_S)
        since = running.spent() - before
        spent = service.Spent(spent.argon2_s + since.argon2_s, spent.other_s + since.other_s)
        done, took_s = done + signed_in, took_s + seconds
    return {
        "argon2_threads": threads,
        "logins_per_s": done / took_s,
        "bare_argon2_per_s": bare_done / bare_s,
        "ratio": (done / took_s) / (bare_done / bare_s),
        "argon2_ms_of_login": spent.argon2_s / done * 1000,
        "other_ms_of_login": spent.other_s / done * 1000,
        "other_share": spent.other_s / (spent.argon2_s + spent.other_s),
    }


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
        self._tokens: asyncio.Queue[str] = asyncio.Queue()
        for token, _ in people:
            self._tokens.put_nowait(token)

    async def refresh(self) -> None:
        """With whichever token nobody else is using; it is kept where there is no new one."""
        token = await self._tokens.get()
        self._tokens.put_nowait(await self._client.refresh(token) or token)

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


async def flooded(running: service.Service, owner_url: str) -> tuple[list[Row], Row]:
    """Refresh and keys, alone and in a flood; what became of the flood, and what it cost beside argon2."""
    async with _http() as http:
        client = Client(http, running.url)
        calm = Calm(client, await people(client, owner_url, 64))
        before = running.spent()
        alone = await calm.measure(ALONE_S, "alone")
        calm_s = (running.spent() - before).other_s / ALONE_S
        flood = Client(http, running.url)
        numbers = itertools.cycle(range(100, USERS + 1))
        before = running.spent()
        offered, during = await asyncio.gather(
            paced(FLOOD_PER_S, FLOOD_S, lambda: flood.login(next(numbers))), calm.measure(FLOOD_S, "in a flood")
        )
        flood_s = (running.spent() - before).other_s - calm_s * FLOOD_S
    refused = flood.statuses[HTTPStatus.SERVICE_UNAVAILABLE]
    became = {
        "offered_per_s": FLOOD_PER_S,
        "offered": len(offered),
        "let_in": flood.statuses[HTTPStatus.OK],
        "turned_away": refused,
        "other": len(offered) - flood.statuses[HTTPStatus.OK] - refused,
        "calm_failed": sum(count for status, count in client.statuses.items() if status >= HTTPStatus.BAD_REQUEST),
        "other_ms_of_one": flood_s / len(offered) * 1000,
        "turned_away_p50_ms": report.percentile(flood.refused_ms, 0.5),
        "turned_away_p99_ms": report.percentile(flood.refused_ms, 0.99),
    }
    return [*alone, *during], became


async def compared(running: service.Service, threads: int) -> Row:
    async with _http() as http:
        return await beside_bare(Client(http, running.url), running, threads)


def _http() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT)


def aims(login: Row, flood: Row, latencies: list[Row], sizes: list[Row], migrated: Row) -> list[dict[str, Any]]:
    """What issue and documents promise, beside what was seen."""
    in_flood = max(row["p99_ms"] for row in latencies if row["what"].endswith("in a flood"))
    slowest, wait_ms = max(row["p95_ms"] for row in sizes), migrated["longest_wait_ms"]
    most = max(row["users"] for row in sizes)
    unindexed = sum(row["read_whole"] for row in sizes if row["users"] == most)
    turned_away = flood["other_ms_of_one"] / (login["argon2_ms_of_login"] + login["other_ms_of_login"])
    lookup, lock = growth.LOOKUP_BOUND_MS, growth.LOCK_BOUND_MS
    return [
        report.aim("logins a second, of bare argon2's", login["ratio"], ">= 0.9", login["ratio"] >= 0.9),
        report.aim(
            "share of a login's processor time that is not argon2",
            login["other_share"],
            "<= 0.1",
            login["other_share"] <= 0.1,
        ),
        report.aim("p99 of refresh and keys in a flood, ms", in_flood, "< 300", in_flood < 300),
        report.aim("one offered in a flood, beside argon2, of a login", turned_away, "<= 0.1", turned_away <= 0.1),
        report.aim("p95 of look-ups and lists, ms", slowest, f"< {lookup}", slowest < lookup),
        report.aim("large tables that they read from end to end", unindexed, "== 0", unindexed == 0),
        report.aim("longest wait for a migration, ms", wait_ms, f"< {lock}", wait_ms < lock),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.auth", description=__doc__)
    parser.add_argument("--full", action="store_true", help="to 10⁶ users, and the migrations on as many")
    full = parser.parse_args().full
    threads, cores = service.setting("threads"), len(os.sched_getaffinity(0))
    *smaller, most = SIZES_FULL if full else SIZES
    with service.stores() as stores:
        small, owner_url = stores.database("small"), stores.database("bench")
        service.migrate(small)
        sizes = asyncio.run(growth.lookups(small, smaller))
        migrated = growth.migrations(owner_url, most)
        sizes += asyncio.run(growth.lookups(owner_url, [most], present=most))
        print(*(report.table(rows) for rows in (sizes, [migrated])), sep="\n\n", flush=True)
        with service.serving(owner_url, stores.redis_url, threads=threads) as running:
            logins_seen = [asyncio.run(compared(running, threads))]
            latencies, flood = asyncio.run(flooded(running, owner_url))
        if cores != threads:
            with service.serving(owner_url, stores.redis_url, threads=cores) as running:
                logins_seen.append(asyncio.run(compared(running, cores)))
    print(*(report.table(rows) for rows in (logins_seen, [flood])), sep="\n\n")
    found = aims(logins_seen[0], flood, latencies, sizes, migrated)
    name = "auth-full" if full else "auth"
    report.write(name, latencies, found, login=logins_seen, flood=flood, growth=sizes, migrations=migrated)


if __name__ == "__main__":
    main()
