"""PostgreSQL and Valkey of the bench's own, with auth's tables, and one key in them whose limits never refuse."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from redis import Redis

from bench.stack import ROOT
from deploy.local.stack import Stack
from deploy.local.state import Layout

LIMITS = {"minute": 1_000_000, "hour": 1_000_000, "day": 1_000_000_000, "concurrency": 100_000}


@dataclass(frozen=True, slots=True)
class Stores:
    """Where they are, what a service needs to use them, and the key."""

    postgres_url: str
    redis_url: str
    environment: Mapping[str, str]
    key: str
    redis_pid: int


@contextmanager
def running() -> Iterator[Stores]:
    """Start them in a temporary place; stop them at the end."""
    state = tempfile.mkdtemp(prefix="tollgate-bench-")
    stores = Stack(Layout(ROOT, Path(state) / "stores"), 1, {})
    try:
        stores.start_data_stores()
        environment = _environment(stores.postgres.url(), stores.valkey.url)
        _auth(environment, "migrate")
        made = json.loads(
            _auth(
                environment, "bootstrap", "--username", "bench", "--email", "bench@example.com", "--key-name", "bench"
            )
        )
        asyncio.run(_lift_limits(environment["TOLLGATE_DATABASE_URL"], made["key_id"]))
        with Redis.from_url(stores.valkey.url) as redis:
            redis_pid = int(redis.info("server")["process_id"])
        yield Stores(stores.postgres.url(), stores.valkey.url, environment, made["key"], redis_pid)
    finally:
        stores.down()
        shutil.rmtree(state, ignore_errors=True)


def _environment(postgres_url: str, redis_url: str) -> dict[str, str]:
    def secret() -> str:
        return base64.b64encode(secrets.token_bytes(32)).decode()

    return {
        "PATH": os.environ["PATH"],
        "TOLLGATE_DATABASE_URL": postgres_url,
        "TOLLGATE_AUTH_DATABASE_URL": _as_role(postgres_url, "tollgate_auth"),
        "TOLLGATE_GATEWAY_DATABASE_URL": _as_role(postgres_url, "tollgate_gateway"),
        "TOLLGATE_REDIS_URL": redis_url,
        "TOLLGATE_IDENTITY_KEYS": f"bench:{secret()}",
        "TOLLGATE_API_KEY_PEPPERS": f"1:{secret()}",
        "TOLLGATE_AUTH_SECRET_KEY": secret(),
        "TOLLGATE_BOOTSTRAP_PASSWORD": secrets.token_urlsafe(24),
    }


def _as_role(url: str, role: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{role}:{secrets.token_hex(12)}@{parts.hostname}:{parts.port}"))


def _auth(environment: Mapping[str, str], *arguments: str) -> str:
    """One of auth's commands; the last line of its standard output."""
    command = [sys.executable, "-m", "services.auth", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return ran.stdout.strip().rpartition("\n")[2]


async def _lift_limits(url: str, key_id: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "UPDATE auth.api_key SET limits = $2, version = version + 1 WHERE id = $1::uuid", key_id, json.dumps(LIMITS)
        )
    finally:
        await connection.close()
