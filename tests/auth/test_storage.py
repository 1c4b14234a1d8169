"""PostgreSQL away or too busy: an honest 503, nothing of our insides, and everything works again afterwards."""

from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from services.auth.repository.sign_in import SignInDatabase
from services.auth.service.access import Access
from shared.database import is_temporary
from tests.auth.harness import PASSWORD, Auth, Cable, User, running
from tests.conftest import Components, role_url


def through(cable: Cable, url: str) -> str:
    """The same database and role, over the cable."""
    parts, line = urlsplit(url), urlsplit(cable.url)
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{line.port}"))


@pytest_asyncio.fixture(loop_scope="session")
async def cabled(owner_url: str, components: Components) -> AsyncIterator[tuple[Auth, Cable]]:
    """The application, and its line to PostgreSQL."""
    cable = Cable(owner_url)
    await cable.mend()
    try:
        url = SecretStr(through(cable, role_url(owner_url, "tollgate_auth")))
        async with running(owner_url, components.redis_url, auth_database_url=url) as auth:
            yield auth, cable
    finally:
        await cable.cut()


async def ask(auth: Auth, user: User, identity: Any) -> list[tuple[int, str]]:
    """Status and code of requests that need PostgreSQL in each of the ways that there are."""
    body = {"username": user.username, "password": PASSWORD}
    answers = [
        await auth.call("POST", "/api/v1/auth/login", json=body),
        await auth.call("POST", "/api/v1/auth/refresh", json={"refresh_token": "unknown"}),
        await auth.call_as(identity, "GET", "/api/v1/keys"),
        await auth.call_as(identity, "POST", "/api/v1/keys", json={"name": "k"}),
    ]
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    return [(answer.status_code, answer.json().get("code", "")) for answer in answers]


async def test_while_postgresql_is_away_everything_is_a_503_and_then_it_works(cabled: tuple[Auth, Cable]) -> None:
    auth, cable = cabled
    user = await auth.user()
    identity = await auth.identity_of_token(user.access_token)
    works = [(200, ""), (401, "invalid_refresh_token"), (200, ""), (201, "")]
    assert await ask(auth, user, identity) == works
    await cable.cut()
    for _ in range(2):  # connections that broke off, and then none to be had
        assert await ask(auth, user, identity) == [(503, "storage_unavailable")] * 4
    await cable.mend()
    assert await ask(auth, user, identity) == works


def said(error: type[Exception], state: str) -> DBAPIError:
    """As SQLAlchemy hands on what PostgreSQL says."""
    original = error("said by PostgreSQL: a secret")
    original.sqlstate = state  # type: ignore[attr-defined]
    return DBAPIError("SELECT 'a secret'", {}, original)


TEMPORARY: tuple[Callable[[], Exception], ...] = (
    lambda: PoolTimeout("QueuePool limit reached"),
    lambda: TimeoutError(),
    lambda: ConnectionRefusedError(),
    lambda: asyncpg.TooManyConnectionsError(),
    lambda: asyncpg.InterfaceError("connection is closed"),
    lambda: said(Exception, "57014"),
    lambda: said(Exception, "40P01"),
)


@pytest.mark.parametrize("make", TEMPORARY)
async def test_what_may_succeed_later_is_a_503_that_tells_nothing(
    auth: Auth, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception]
) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise make()

    user = await auth.user()
    monkeypatch.setattr(Access, "resolve", fails)
    monkeypatch.setattr(SignInDatabase, "find", fails)
    for answer in (
        await auth.call("GET", "/api/v1/keys", token=user.access_token),
        await auth.login(user.username),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert "secret" not in answer.text


@pytest.mark.parametrize(
    "fault",
    [
        IntegrityError("INSERT 'a secret'", {}, Exception("duplicate key: a secret")),
        said(Exception, "42P01"),
        asyncpg.UndefinedTableError(),
        ValueError("TooManyConnectionsError"),
    ],
)
def test_a_fault_of_ours_is_none_of_these(fault: Exception) -> None:
    assert not is_temporary(fault)
