"""The operator's command line: what it does, and that it shows a secret once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from shared.apikeys import Peppers
from shared.database import dsn
from tests.auth.harness import IDENTITY_KEYS, PASSWORD, PEPPERS, SECRET_KEY, Auth
from tests.conftest import Components, role_url

ROOT = Path(__file__).parents[2]
DEADLINE_S = 150


@pytest.fixture(scope="module")
def environment(owner_url: str, components: Components) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "TOLLGATE_AUTH_DATABASE_URL": role_url(owner_url, "tollgate_auth"),
        "TOLLGATE_REDIS_URL": components.redis_url,
        "TOLLGATE_IDENTITY_KEYS": IDENTITY_KEYS,
        "TOLLGATE_API_KEY_PEPPERS": PEPPERS,
        "TOLLGATE_AUTH_SECRET_KEY": SECRET_KEY,
        "TOLLGATE_AUTH_ARGON2_MEMORY_KIB": "64",
        "TOLLGATE_AUTH_ARGON2_TIME_COST": "1",
        "TOLLGATE_BOOTSTRAP_PASSWORD": PASSWORD,
    }


def run(environment: dict[str, str], *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "services.auth", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def rows(environment: dict[str, str], *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(environment, *arguments, "--json").splitlines()]


async def view_row(environment: dict[str, str], owner_url: str, key: str) -> asyncpg.Record:
    connection = await asyncpg.connect(dsn(role_url(owner_url, "tollgate_gateway")))
    try:
        query = "SELECT * FROM auth.key_view WHERE digest = $1"
        return await connection.fetchrow(query, Peppers(PEPPERS).digest(key).hex)
    finally:
        await connection.close()


async def test_an_operator_runs_an_installation_from_the_shell(
    auth: Auth, environment: dict[str, str], owner_url: str
) -> None:
    [made] = rows(environment, "users", "create", "--username", "grace", "--email", "g@example.com", "--role", "admin")
    assert made["roles"] == ["admin", "user"]
    assert (await auth.login("grace")).status_code == 200
    [team] = rows(environment, "orgs", "create", "--name", "Compilers", "--owner", "grace")
    [key] = rows(environment, "keys", "create", "--user", "grace", "--name", "first", "--org", team["id"])
    row = await view_row(environment, owner_url, key["key"])
    assert (row["status"], str(row["org_id"]), row["roles"]) == ("active", team["id"], ["admin", "user"])

    listed = [
        run(environment, *command)
        for command in (("keys", "list", "--user", "grace"), ("keys", "revoke", key["id"], "--json"))
    ]
    assert all(key["key"] not in text and key["id"] in text for text in listed)
    assert (await view_row(environment, owner_url, key["key"]))["status"] == "revoked"
    assert rows(environment, "users", "role", "grace", "admin", "--take")[0]["roles"] == ["user"]
    async with auth.connect() as connection:
        audited = await connection.fetch("SELECT action FROM auth.audit_log WHERE request_id LIKE 'cli-%'")
    assert {"user.registered", "user.role_granted", "user.role_taken", "key.created", "key.revoked"} <= {
        row["action"] for row in audited
    }


async def test_a_user_gets_a_new_password_and_is_shut_out(auth: Auth, environment: dict[str, str]) -> None:
    user = await auth.user()
    [issued] = rows(environment, "users", "reset-password", user.email)
    body = {"token": issued["token"], "new_password": f"{PASSWORD} again"}
    assert (await auth.call("POST", "/api/v1/auth/password/reset", json=body)).status_code == 204
    assert (await auth.login(user.username, f"{PASSWORD} again")).status_code == 200
    assert rows(environment, "users", "disable", user.username)[0]["status"] == "disabled"
    assert (await auth.login(user.username, f"{PASSWORD} again")).status_code == 401


async def test_people_and_organisations_are_listed_and_let_in_again(auth: Auth, environment: dict[str, str]) -> None:
    user = await auth.user()
    key = await auth.key(user)
    [gained] = rows(environment, "users", "role", user.username, "operator")
    assert gained["roles"] == ["operator", "user"]
    assert rows(environment, "users", "disable", user.email)[0]["status"] == "disabled"
    assert rows(environment, "users", "enable", user.email)[0]["status"] == "active"
    assert (await auth.login(user.username)).status_code == 200
    [found] = rows(environment, "users", "list", "--search", user.username)
    assert (found["id"], found["email"], found["status"]) == (user.id, user.email, "active")
    made = rows(environment, "orgs", "list")
    assert user.org_id in [org["id"] for org in made]
    assert all(secret not in f"{found}{made}" for secret in (key["key"], PASSWORD, user.refresh_token))


async def test_signing_keys_are_listed_and_rotated(auth: Auth, environment: dict[str, str]) -> None:
    signing = auth.services.signing_keys.signing().kid
    [made] = rows(environment, "signing-keys", "rotate")
    lines = run(environment, "signing-keys", "list").splitlines()
    assert [line.split()[:2] for line in lines] == [["KID", "SIGNS"], [made["kid"], "False"], [signing, "True"]]


def test_what_is_not_there_is_said_so(environment: dict[str, str]) -> None:
    nothing = str(UUID(int=0))
    assert "There is no such API key." in run(environment, "keys", "revoke", nothing, code=1)
