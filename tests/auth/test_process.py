"""The service as the launcher runs it: `python -m services.auth`, its commands, its logs."""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from deploy.local.ports import pick_port
from shared.apikeys import Peppers
from shared.clock import SystemClock
from shared.database import dsn
from shared.identity import HEADER, Identity, IdentityRing
from tests.auth.harness import IDENTITY_KEYS, PASSWORD, PEPPERS, SECRET_KEY
from tests.conftest import Components, FreshDatabase, role_url

ROOT = Path(__file__).parents[2]
DEADLINE_S = 150
BOOTSTRAP_PASSWORD = "a password for the first user"


@pytest.fixture(scope="module")
def environment(fresh_database: FreshDatabase, components: Components) -> dict[str, str]:
    """What the launcher gives to auth's commands, over an empty database."""
    owner_url = fresh_database("auth")
    listen = f"127.0.0.1:{pick_port()}"
    return {
        "PATH": os.environ["PATH"],
        "TOLLGATE_DATABASE_URL": owner_url,
        "TOLLGATE_AUTH_DATABASE_URL": role_url(owner_url, "tollgate_auth"),
        "TOLLGATE_GATEWAY_DATABASE_URL": role_url(owner_url, "tollgate_gateway"),
        "TOLLGATE_REDIS_URL": components.redis_url,
        "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
        "TOLLGATE_API_KEY_PEPPERS": PEPPERS,
        "TOLLGATE_AUTH_SECRET_KEY": SECRET_KEY,
        "TOLLGATE_AUTH_HTTP_LISTEN": listen,
        "TOLLGATE_AUTH_ARGON2_MEMORY_KIB": "64",
        "TOLLGATE_BOOTSTRAP_PASSWORD": BOOTSTRAP_PASSWORD,
    }


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.auth", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def bootstrap(environment: dict[str, str], name: str, *options: str) -> dict[str, str]:
    done = command(
        environment,
        *("bootstrap", "--username", name, "--email", f"{name}@example.com", "--key-name", "first", *options),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    made: dict[str, str] = json.loads(done.stdout)
    return made


@contextmanager
def serving(environment: dict[str, str], log: Path) -> Iterator[httpx.Client]:
    """The process, ready; ended by SIGTERM, which must be a clean end."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.auth"],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        listen = environment["TOLLGATE_AUTH_HTTP_LISTEN"]
        with httpx.Client(base_url=f"http://{listen}", timeout=DEADLINE_S, trust_env=False) as client:
            wait_ready(client, process, log)
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def migrated(environment: dict[str, str]) -> dict[str, str]:
    done = command(environment, "migrate")
    assert done.returncode == 0, done.stderr
    return environment


def test_many_migrations_at_once_of_an_empty_database_all_succeed(
    environment: dict[str, str], fresh_database: FreshDatabase
) -> None:
    owner_url = fresh_database("auth")
    urls = {
        "TOLLGATE_DATABASE_URL": owner_url,
        "TOLLGATE_AUTH_DATABASE_URL": role_url(owner_url, "tollgate_auth"),
        "TOLLGATE_GATEWAY_DATABASE_URL": role_url(owner_url, "tollgate_gateway"),
    }
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: command({**environment, **urls}, "migrate"), range(3)))
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr[-2000:] for run in runs]


async def view_row(environment: dict[str, str], key: str) -> asyncpg.Record:
    connection = await asyncpg.connect(dsn(environment["TOLLGATE_GATEWAY_DATABASE_URL"]))
    try:
        return await connection.fetchrow(
            "SELECT * FROM auth.key_view WHERE digest = $1", Peppers(PEPPERS).digest(key).hex
        )
    finally:
        await connection.close()


async def test_bootstrap_prints_a_fresh_key_each_time_and_revokes_the_one_before(migrated: dict[str, str]) -> None:
    first = bootstrap(migrated, "demo")
    second = bootstrap(migrated, "demo")
    assert (first["user_id"], first["org_id"]) == (second["user_id"], second["org_id"])
    assert (await view_row(migrated, first["key"]))["status"] == "revoked"
    row = await view_row(migrated, second["key"])
    assert (row["status"], row["scopes"]) == ("active", ["chat", "models", "inference", "billing:read"])


async def test_bootstrap_gives_a_role_and_the_scopes_that_it_needs_or_those_that_are_named(
    migrated: dict[str, str],
) -> None:
    first = await view_row(migrated, bootstrap(migrated, "root.user", "--role", "operator", "--scopes", "admin")["key"])
    assert (first["roles"], first["scopes"]) == (["operator", "user"], ["admin"])
    promoted = await view_row(migrated, bootstrap(migrated, "root.user", "--role", "admin")["key"])
    assert (promoted["roles"], promoted["scopes"]) == (["admin", "operator", "user"], ["admin", "*"])


async def test_bootstrap_gives_a_key_limits_of_its_own_above_its_plans(migrated: dict[str, str]) -> None:
    plain = await view_row(migrated, bootstrap(migrated, "plain.script")["key"])
    made = bootstrap(migrated, "busy.script", "--limit", "minute=600", "--limit=hour=10000")
    row = await view_row(migrated, made["key"])
    assert json.loads(row["limits"]) == {**json.loads(plain["limits"]), "minute": 600, "hour": 10_000}


def test_bootstrap_refuses_a_limit_that_is_none(migrated: dict[str, str]) -> None:
    options = ("--username", "nobody", "--email", "nobody@example.com", "--key-name", "k", "--limit", "week=1")
    bad = command(migrated, "bootstrap", *options)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "such as minute=600" in bad.stderr


def test_bootstrap_refuses_what_registration_refuses(migrated: dict[str, str]) -> None:
    weak = command(
        {**migrated, "TOLLGATE_BOOTSTRAP_PASSWORD": "password"},
        *("bootstrap", "--username", "weak", "--email", "weak@example.com", "--key-name", "k"),
    )
    assert (weak.returncode, weak.stdout) == (1, "")
    assert "password" in weak.stderr
    bad = command(migrated, "bootstrap", "--username", "no spaces", "--email", "w@example.com", "--key-name", "k")
    assert (bad.returncode, bad.stdout) == (1, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOLLGATE_AUTH_SECRET_KEY", "c2hvcnQ="),
        ("TOLLGATE_AUTH_SECRET_KEY", "!"),
        ("TOLLGATE_AUTH_DATABASE_URL", None),
        ("TOLLGATE_AUTH_ARGON2_THREADS", "0"),
    ],
)
def test_a_wrong_setting_is_named_and_not_shown(environment: dict[str, str], name: str, value: str | None) -> None:
    changed = {k: v for k, v in environment.items() if k != name} | ({name: value} if value else {})
    done = command(changed)
    assert done.returncode == 2
    assert done.stderr.startswith(f"setting {name}: ")
    assert SECRET_KEY not in done.stderr


def test_the_process_serves_and_logs_no_secret(migrated: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "auth.log"
    ring = IdentityRing(IDENTITY_KEYS, SystemClock())
    password = f"{PASSWORD} {secrets.token_hex(4)}"
    seen = [password, BOOTSTRAP_PASSWORD]
    with serving(migrated, log) as client:
        anonymous = {HEADER: ring.sign(Identity("anonymous"))}
        body = {"username": "served", "email": "served@example.com", "password": password}
        made = client.post("/api/v1/auth/register", json=body, headers=anonymous)
        assert made.status_code == 201
        tokens = client.post("/api/v1/auth/login", json=body, headers=anonymous).json()
        claims = json.loads(base64.urlsafe_b64decode(tokens["access_token"].split(".")[1] + "=="))
        person = Identity("user", user_id=claims["sub"], org_id=claims["org"], session_id=claims["sid"])
        signed = {HEADER: ring.sign(person)}
        key = client.post("/api/v1/keys", json={"name": "k"}, headers=signed).json()
        client.delete(f"/api/v1/keys/{key['id']}", headers=signed)
        client.post("/api/v1/auth/refresh", json={"refresh_token": tokens["refresh_token"]}, headers=anonymous)
        client.post("/api/v1/auth/refresh", json={"refresh_token": tokens["refresh_token"]}, headers=anonymous)
        client.post("/api/v1/auth/register", json=body, headers=anonymous)
        client.post("/api/v1/auth/login", json=body | {"password": [password]}, headers=anonymous)
        seen += [tokens["access_token"], tokens["refresh_token"], key["key"], signed[HEADER]]
        metrics = client.get("/metrics").text
        health = client.get("/healthz").json()
    assert health == {"status": "ok"}
    assert 'tollgate_auth_logins_total{result="ok"} 1.0' in metrics
    text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"started", "request", "stopped"} <= {line["event"] for line in lines}
    assert all(line["service"] == "auth" for line in lines)
    secrets_of_settings = [migrated[name].split("@")[0] for name in migrated if name.endswith("_URL")]
    for secret in (*seen, *secrets_of_settings, SECRET_KEY, PEPPERS, IDENTITY_KEYS):
        assert secret not in text
        assert secret not in metrics


def test_with_another_secret_key_it_says_so_and_does_not_start(migrated: dict[str, str]) -> None:
    bootstrap(migrated, "first.of.all")  # makes the signing key
    other = base64.b64encode(b"o" * 32).decode()
    done = command({**migrated, "TOLLGATE_AUTH_SECRET_KEY": other})
    assert done.returncode == 1
    assert done.stderr.strip().startswith("auth: TOLLGATE_AUTH_SECRET_KEY does not open")
    assert other not in done.stderr


def test_after_a_restart_the_same_key_signs(migrated: dict[str, str], tmp_path: Path) -> None:
    kids = []
    for run in range(2):
        with serving(migrated, tmp_path / f"{run}.log") as client:
            kids.append([key["kid"] for key in client.get("/.well-known/jwks.json").json()["keys"]])
    assert kids[0] == kids[1]
    assert len(kids[0]) == 1
