"""Nobody finds out by signing in who has an account: not by the answer, not by the work, not by the time."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from services.auth.repository.sign_in import Connection, SignInDatabase
from services.auth.service.passwords import Passwords
from tests.auth.harness import Auth, running
from tests.conftest import Components

WRONG = "a wrong password"
ROUNDS = 400
TELLING = 0.1
"""How far from even the odds may be that one kind of name takes longer than another: six standard deviations of chance
at so many rounds."""


async def names(auth: Auth) -> dict[str, str]:
    """One of every kind that must look alike."""
    known, disabled, operator, external = [await auth.user(role) for role in (None, None, "operator", None)]
    await auth.call(
        "POST",
        f"/api/v1/admin/auth/users/{disabled.id}/status",
        token=operator.access_token,
        json={"status": "disabled"},
    )
    path = f"/api/v1/organizations/{known.org_id}/service-accounts"
    service = (await auth.call("POST", path, token=known.access_token, json={"name": "batch"})).json()
    async with auth.connect() as connection:
        await connection.execute("UPDATE auth.user_account SET password_hash = '!' WHERE id = $1", external.id)
    return {
        "unknown": f"nobody-{secrets.token_hex(6)}",
        "unknown address": f"{secrets.token_hex(6)}@example.com",
        "known": known.username,
        "known address": known.email,
        "disabled": disabled.username,
        "without a password": external.username,
        "service account": f"service-{service['id'].replace('-', '')}",
    }


async def test_every_failed_sign_in_asks_the_same_of_the_database_and_of_argon2(
    auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    work: list[str] = []
    connection, matches = SignInDatabase.connection, Passwords._matches

    @asynccontextmanager
    async def watched(self: SignInDatabase) -> AsyncIterator[Connection]:
        def note(query: asyncpg.connection.LoggedQuery) -> None:
            work.append(query.query)

        async with connection(self) as held:
            with held.query_logger(note):
                yield held
                await asyncio.sleep(0)  # what was asked is told in the next round of the loop

    def counted(self: Passwords, stored: str, password: str) -> bool:
        work.append(stored.rpartition("$")[0].rpartition("$")[0])  # algorithm, version, parameters
        return matches(self, stored, password)

    everybody = await names(auth)
    monkeypatch.setattr(SignInDatabase, "connection", watched)
    monkeypatch.setattr(Passwords, "_matches", counted)
    seen, answers = {}, {}
    for kind, name in everybody.items():
        work.clear()
        answer = await auth.login(name, WRONG)
        seen[kind] = tuple(work)
        answers[kind] = (answer.status_code, {**answer.json(), "request_id": ""}, sorted(answer.headers))
    assert len(set(seen.values())) == 1, seen
    assert all(answer == answers["known"] for answer in answers.values()), answers
    assert len(seen["known"]) > 4
    assert "$argon2id$v=19$m=64,t=1,p=1" in seen["known"]


@pytest.mark.torture
@pytest.mark.timeout(7_200)
async def test_no_kind_of_name_takes_longer_than_another(owner_url: str, components: Components) -> None:
    """In turns and in random order, so that whatever else runs slows all of them alike; with the real parameters."""
    many: dict[str, Any] = {
        "auth_argon2_time_cost": 2,
        "auth_argon2_memory_kib": 19_456,
        **{f"auth_sign_in_{kind}_free": 1_000_000 for kind in ("pair", "name", "address")},
    }
    async with running(owner_url, components.redis_url, **many) as auth:
        everybody = await names(auth)
        taken: dict[str, list[float]] = {kind: [] for kind in everybody}
        for _ in range(ROUNDS):
            for kind in random.sample(list(everybody), len(everybody)):
                started = time.perf_counter()
                assert (await auth.login(everybody[kind], WRONG)).status_code == 401
                taken[kind].append(time.perf_counter() - started)
    odds = {kind: _odds(times, taken["unknown"]) for kind, times in taken.items() if kind != "unknown"}
    print({kind: round(found, 3) for kind, found in odds.items()})
    assert all(abs(found - 0.5) < TELLING for found in odds.values()), odds


def _odds(ones: list[float], others: list[float]) -> float:
    """How likely one of the ones is above one of the others (Mann-Whitney's U, as a share)."""
    return sum((one > other) + (one == other) / 2 for one in ones for other in others) / (len(ones) * len(others))
