"""How look-ups, lists and migrations grow with the number of users."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any
from uuid import uuid4

import asyncpg
from alembic import command

from bench import report
from bench.auth import service
from services.auth.repository.sign_in import FIND
from shared.database import alembic_config, migrate
from tests.conftest import role_url

SAMPLES = 200
LOOKUP_BOUND_MS, LOCK_BOUND_MS = 50, 1_000
BEFORE_THIS_RELEASE = "0004"
PROBE_PAUSE_S = 0.002

QUERIES = {
    "sign-in: account by name or address": FIND.replace("$1::text", "concat('user-', $1::text)"),
    "gateway: key by digest": "SELECT * FROM auth.key_view WHERE digest = md5('a' || $1) || md5('b' || $1::text)",
    "list: keys of an organisation": (
        "SELECT * FROM auth.api_key WHERE org_id = md5('org' || $1::text)::uuid ORDER BY id DESC LIMIT 20"
    ),
    "list: all keys": "SELECT * FROM auth.api_key WHERE id < md5($1::text)::uuid ORDER BY id DESC LIMIT 50",
    "list: all organisations": (
        "SELECT * FROM auth.organization WHERE id < md5($1::text)::uuid ORDER BY id DESC LIMIT 50"
    ),
    "list: all users": "SELECT * FROM auth.user_account WHERE id < md5($1::text)::uuid ORDER BY id DESC LIMIT 50",
    "search: users by the beginning of a name": (
        "SELECT * FROM auth.user_account WHERE lower(username) ~>=~ lower('User-' || $1::text) "
        "AND lower(username) ~<~ concat(lower('User-' || $1::text), U&'\\+10FFFF') "
        "ORDER BY lower(username) USING ~<~ LIMIT 50"
    ),
    "search: users by the beginning of an address": (
        "SELECT * FROM auth.user_account WHERE lower(email) ~>=~ lower('User-' || $1::text || '@') "
        "AND lower(email) ~<~ concat(lower('User-' || $1::text || '@'), U&'\\+10FFFF') "
        "ORDER BY lower(email) USING ~<~ LIMIT 50"
    ),
}
LARGE = {"user_account", "user_role", "organization", "membership", "api_key"}  # as large as there are users


async def lookups(owner_url: str, sizes: list[int], present: int = 0) -> list[dict[str, Any]]:
    """Each query's times at each size, in a database that has the first `present` users already."""
    connection = await service.connect(owner_url)
    rows = []
    try:
        for size in sizes:
            if size > present:
                await service.populate(connection, present + 1, size)
                present = size
            for name, query in QUERIES.items():
                statement = await connection.prepare(query)
                times = []
                for _ in range(SAMPLES):
                    argument = str(random.randint(1, size))
                    started = time.perf_counter()
                    await statement.fetch(argument)
                    times.append((time.perf_counter() - started) * 1000)
                p50, p95 = report.percentile(times, 0.5), report.percentile(times, 0.95)
                whole = read_whole((await statement.explain("1"))[0]["Plan"])
                rows.append({"what": name, "users": size, "p50_ms": p50, "p95_ms": p95, "read_whole": whole})
    finally:
        await connection.close()
    return rows


def read_whole(plan: dict[str, Any]) -> int:
    """How many of the large tables a plan reads from end to end."""
    here = plan["Node Type"] == "Seq Scan" and plan["Relation Name"] in LARGE
    return here + sum(read_whole(part) for part in plan.get("Plans", ()))


def migrations(url: str, users: int) -> dict[str, Any]:
    """The longest that a sign-in waits for the migrations of this release, on so many users, in an empty database."""
    app_url = role_url(url, "tollgate_auth")
    migrate("auth", url, app_url, revision=BEFORE_THIS_RELEASE)
    asyncio.run(_fill(url, users))
    waits: list[float] = []
    done = threading.Event()
    prober = threading.Thread(target=lambda: asyncio.run(_probe(url, waits, done)))
    prober.start()
    started = time.perf_counter()
    command.upgrade(alembic_config("auth", url), "head")
    took_s = time.perf_counter() - started
    done.set()
    prober.join()
    service.migrate(url)  # and the rights
    return {"what": "migrations of this release", "users": users, "took_s": took_s, "longest_wait_ms": max(waits)}


async def _fill(url: str, users: int) -> None:
    connection = await service.connect(url)
    try:
        await service.populate(connection, 1, users)
    finally:
        await connection.close()


async def _probe(url: str, waits: list[float], done: threading.Event) -> None:
    """Sign-ins and admissions, as far as PostgreSQL is concerned, again and again."""
    connection: asyncpg.Connection = await service.connect(url)
    try:
        while not done.is_set():
            started = time.perf_counter()
            await connection.execute(
                "UPDATE auth.user_account SET updated_at = now() WHERE lower(username) = 'user-1'", timeout=60
            )
            await connection.execute("UPDATE auth.api_key SET last_used_at = now() WHERE id = $1", uuid4(), timeout=60)
            await connection.fetch("SELECT 1 FROM auth.key_view WHERE digest = 'x'", timeout=60)
            waits.append((time.perf_counter() - started) * 1000)
            await asyncio.sleep(PROBE_PAUSE_S)
    finally:
        await connection.close()
