"""Auth as a process of its own over PostgreSQL and Valkey of its own, and people in it without asking it."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import argon2
import asyncpg
import psutil

from bench.stack import ROOT
from deploy.local.ports import pick_port
from deploy.local.postgres import OWNER
from deploy.local.stack import Stack
from deploy.local.state import Layout
from services.auth.cli import migrate_urls
from services.auth.settings import AuthSettings
from shared.clock import SystemClock
from shared.database import dsn
from shared.identity import HEADER, Identity, IdentityRing
from tests.conftest import role_url, with_database

START_S = 60
PASSWORD = "correct horse battery staple"
IDENTITY_KEYS = f"bench:{base64.b64encode(secrets.token_bytes(32)).decode()}"


def setting(name: str) -> int:
    """What the service takes where the environment says nothing."""
    value: int = AuthSettings.model_fields[f"auth_argon2_{name}"].get_default(call_default_factory=True)
    return value


def hasher() -> argon2.PasswordHasher:
    """argon2id with the parameters that the service has."""
    return argon2.PasswordHasher(
        time_cost=setting("time_cost"), memory_cost=setting("memory_kib"), parallelism=setting("parallelism")
    )


@dataclass(frozen=True)
class Stores:
    """PostgreSQL and Valkey."""

    postgres_url: str
    redis_url: str
    stack: Stack

    def database(self, name: str) -> str:
        """A new empty database; its owner's URL."""
        found = f"{name}_{secrets.token_hex(4)}"
        self.stack.postgres.execute(f"CREATE DATABASE {found} OWNER {OWNER}")
        return with_database(self.postgres_url, found)


@contextmanager
def stores() -> Iterator[Stores]:
    """In a temporary directory; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-", ignore_cleanup_errors=True) as state:
        stack = Stack(Layout(ROOT, Path(state) / "data"), 1, {})
        try:
            stack.start_data_stores()
            yield Stores(stack.postgres.url(), stack.valkey.url, stack)
        finally:
            stack.down()


def migrate(owner_url: str) -> None:
    """Auth's schema, as `python -m services.auth migrate` makes it."""
    migrate_urls(owner_url, role_url(owner_url, "tollgate_auth"), role_url(owner_url, "tollgate_gateway"))


@dataclass(frozen=True)
class Spent:
    """Processor time of the service, in seconds: in its argon2 threads, and otherwise."""

    argon2_s: float
    other_s: float

    def __sub__(self, before: Spent) -> Spent:
        return Spent(self.argon2_s - before.argon2_s, self.other_s - before.other_s)


@dataclass(frozen=True)
class Service:
    """Auth, running."""

    url: str
    process: psutil.Process

    def spent(self) -> Spent:
        """What it has used. The argon2 threads are those that yield to the others."""
        argon2_s = other_s = 0.0
        for thread in self.process.threads():
            if _nice(self.process.pid, thread.id) == setting("nice"):
                argon2_s += thread.user_time + thread.system_time
            else:
                other_s += thread.user_time + thread.system_time
        return Spent(argon2_s, other_s)


def _nice(pid: int, thread_id: int) -> int:
    """proc(5): the 19th field, of which the second is a name in brackets."""
    return int(Path(f"/proc/{pid}/task/{thread_id}/stat").read_text().rpartition(")")[2].split()[16])


@contextmanager
def serving(owner_url: str, redis_url: str, *, threads: int) -> Iterator[Service]:
    """One process with the default settings, but for the number of argon2 threads."""
    listen = f"127.0.0.1:{pick_port()}"
    environment = {
        "PATH": os.environ["PATH"],
        "TOLLGATE_AUTH_DATABASE_URL": role_url(owner_url, "tollgate_auth"),
        "TOLLGATE_REDIS_URL": redis_url,
        "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
        "TOLLGATE_API_KEY_PEPPERS": f"1:{base64.b64encode(b'p' * 32).decode()}",
        "TOLLGATE_AUTH_SECRET_KEY": base64.b64encode(b"s" * 32).decode(),
        "TOLLGATE_AUTH_HTTP_LISTEN": listen,
        "TOLLGATE_AUTH_ARGON2_THREADS": str(threads),
        "TOLLGATE_AUTH_REDIS_TIMEOUT_MS": "1000",
        "TOLLGATE_AUTH_KEYS_PER_ORG_MAX": "1000000",
        "TOLLGATE_LOG_LEVEL": "ERROR",
    }
    process = subprocess.Popen([sys.executable, "-m", "services.auth"], cwd=ROOT, env=environment)
    try:
        _wait(f"http://{listen}/readyz", process)
        yield Service(f"http://{listen}", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def header(identity: Identity) -> dict[str, str]:
    """What the gateway would send."""
    return {HEADER: IdentityRing(IDENTITY_KEYS, SystemClock()).sign(identity)}


async def populate(connection: asyncpg.Connection, first: int, last: int) -> None:
    """Users `first` to `last`, each with an organisation and a key; all with one password."""
    password_hash = hasher().hash(PASSWORD)
    user, org, key = (f"md5('{kind}' || n)::uuid" for kind in ("user", "org", "key"))
    rows = f"FROM generate_series({first}, {last}) n"
    for statement in (
        f"INSERT INTO auth.user_account (id, username, email, password_hash) "
        f"SELECT {user}, 'user-' || n, 'user-' || n || '@example.com', '{password_hash}' {rows}",
        f"INSERT INTO auth.user_role (user_id, role) SELECT {user}, 'user' {rows}",
        f"INSERT INTO auth.organization (id, name, personal) SELECT {org}, 'user-' || n, true {rows}",
        f"INSERT INTO auth.membership (org_id, user_id, role) SELECT {org}, {user}, 'owner' {rows}",
        f"INSERT INTO auth.api_key (id, org_id, user_id, name, prefix, digest, pepper, scopes, limit_id, created_at) "
        f"SELECT {key}, {org}, {user}, 'k', 'tg_live_', md5('a' || n) || md5('b' || n), 1, ARRAY['chat'], {key}, now() "
        f"{rows}",
    ):
        await connection.execute(statement, timeout=600)
    await connection.execute("ANALYZE", timeout=600)


async def connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(dsn(url), timeout=30)


async def ids(connection: asyncpg.Connection, number: int) -> tuple[UUID, UUID]:
    """User and organisation of a number."""
    row = await connection.fetchrow("SELECT md5('user' || $1::text)::uuid, md5('org' || $1::text)::uuid", str(number))
    return row[0], row[1]


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit("auth did not start")
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"auth was not ready in {START_S} s")
