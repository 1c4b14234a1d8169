"""PostgreSQL: engines with bounded pools, and migrations, one Alembic history per owning service.

Two kinds of role: the owner (TOLLGATE_DATABASE_URL) makes schemas and runs migrations; each service runs as its own
role with what the migrations grant it. `migrate` makes the role from the service's URL, so that a fresh server
needs nothing by hand.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import MetaData, pool, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.ext.asyncio import AsyncSession as AsyncSession

ROOT = Path(__file__).resolve().parent.parent
MIGRATION_LOCK_ID = 0x7011_6A7E
MIGRATION_LOCK_TIMEOUT_S = 600.0
"""Another service's migration may index a large table meanwhile."""
MIGRATION_LOCK_POLL_S = 0.1

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


# What PostgreSQL says when the same may succeed later (its manual's appendix A): connections, resources, shutdown; then
# a statement or a lock that took too long, a deadlock, a serialization failure.
_TEMPORARY_CLASSES = ("08", "53", "57P")
_TEMPORARY_STATES = ("57014", "55P03", "40P01", "40001")
# From the pools and the drivers: no connection could be had, or the one at hand broke off.
_LOST = (PoolTimeout, OSError, TimeoutError, asyncpg.InterfaceError)
ERRORS: tuple[type[Exception], ...] = (*_LOST, DBAPIError, asyncpg.PostgresError)
"""Whatever may come of a statement."""


def is_temporary(error: BaseException) -> bool:
    """Whether the same statement may succeed later: the database is away, or too busy. Else it is at fault itself."""
    if isinstance(error, _LOST) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    state = sqlstate(error)
    return state in _TEMPORARY_STATES or state.startswith(_TEMPORARY_CLASSES)


def sqlstate(error: BaseException) -> str:
    """PostgreSQL's five characters, as the driver or SQLAlchemy has them; empty where there are none."""
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None) or ""


def metadata(schema: str) -> MetaData:
    """The tables of one service, with stable constraint names."""
    return MetaData(schema=schema, naming_convention=NAMING)


def create_engine(
    url: str,
    *,
    application: str,
    pool_size: int = 10,
    pool_overflow: int = 10,
    pool_timeout_s: float = 5,
    connect_timeout_s: float = 5,
    statement_timeout_ms: int = 10_000,
    lock_timeout_ms: int = 5_000,
) -> AsyncEngine:
    """An engine over asyncpg. Every wait has a limit: for a connection, for a lock, for a statement."""
    return create_async_engine(
        make_url(url).set(drivername="postgresql+asyncpg"),
        pool_size=pool_size,
        max_overflow=pool_overflow,
        pool_timeout=pool_timeout_s,
        pool_pre_ping=True,
        pool_recycle=1_800,
        connect_args={
            "timeout": connect_timeout_s,
            "command_timeout": statement_timeout_ms / 1000 + 1,
            "server_settings": {
                "application_name": application,
                "statement_timeout": str(statement_timeout_ms),
                "lock_timeout": str(lock_timeout_ms),
                "idle_in_transaction_session_timeout": "30000",
                "timezone": "UTC",
            },
        },
    )


def session_factory(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions that keep loaded rows usable after commit; one short transaction each: `async with sessions.begin()`."""
    return async_sessionmaker(engine, expire_on_commit=False)


async def ping(engine: AsyncEngine) -> None:
    """Raise unless the database answers: for /readyz."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


def dsn(url: str) -> str:
    """The URL as asyncpg itself reads it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def migrate(service: str, owner_url: str, app_url: str, *, revision: str = "head") -> None:
    """Make the service's role and schema and bring its tables to `revision`. Idempotent; safe to run concurrently.

    Raises whatever the database says; nothing is half-applied, since each migration is one transaction.
    """
    asyncio.run(_prepare(service, owner_url, app_url))
    command.upgrade(alembic_config(service, owner_url), revision)


def ensure_role(owner_url: str, role_url: str) -> None:
    """Make the role of a URL with its password, able to connect and nothing else. Idempotent."""

    async def main() -> None:
        connection = await asyncpg.connect(dsn(owner_url), timeout=10)
        try:
            await _lock_migrations(connection)
            async with connection.transaction():
                await _ensure_role(connection, role_url)
        finally:
            await connection.close()

    asyncio.run(main())


def set_grants(schema: str, owner_url: str, role_url: str, grants: Mapping[str, str]) -> None:
    """Give a role exactly these rights on the tables, views and sequences of a schema, and take away all others.

    `grants` maps a name within the schema to its privileges, as in `{"plan": "SELECT"}`. Idempotent, one transaction.
    """
    role = make_url(role_url).username

    async def main() -> None:
        connection = await asyncpg.connect(dsn(owner_url), timeout=10)
        try:
            await _lock_migrations(connection)
            async with connection.transaction():
                for template in (
                    "REVOKE ALL ON ALL TABLES IN SCHEMA %1$I FROM %2$I",
                    "REVOKE ALL ON ALL SEQUENCES IN SCHEMA %1$I FROM %2$I",
                    "GRANT USAGE ON SCHEMA %1$I TO %2$I",
                ):
                    await _execute_formatted(connection, template, schema, role)
                for name, privileges in grants.items():
                    await _execute_formatted(connection, f"GRANT {privileges} ON %1$I.%3$I TO %2$I", schema, role, name)
        finally:
            await connection.close()

    asyncio.run(main())


def alembic_config(service: str, owner_url: str) -> Config:
    """Alembic's configuration for one service: the section of its name in alembic.ini."""
    config = Config(ROOT / "alembic.ini", ini_section=service)
    config.attributes["url"] = owner_url
    return config


async def _prepare(schema: str, owner_url: str, app_url: str) -> None:
    connection = await asyncpg.connect(dsn(owner_url), timeout=10)
    try:
        await _lock_migrations(connection)
        async with connection.transaction():
            role = await _ensure_role(connection, app_url)
            for template in (
                "CREATE SCHEMA IF NOT EXISTS %1$I",
                "GRANT USAGE ON SCHEMA %1$I TO %2$I",
                "ALTER ROLE %2$I SET search_path = %1$I, public",
            ):
                await _execute_formatted(connection, template, schema, role)
    finally:
        await connection.close()


async def _lock_migrations(connection: asyncpg.Connection) -> None:
    """Take the migration lock until the connection ends. Raises TimeoutError.

    It is asked for again and again, never waited for: a session that waits holds a snapshot, for whose end another
    service's CREATE INDEX CONCURRENTLY waits while it has the lock, and PostgreSQL ends one of them as deadlocked.
    """
    async with asyncio.timeout(MIGRATION_LOCK_TIMEOUT_S):
        while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", MIGRATION_LOCK_ID):  # noqa: ASYNC110
            await asyncio.sleep(MIGRATION_LOCK_POLL_S)


async def _ensure_role(connection: asyncpg.Connection, role_url: str) -> str:
    url = make_url(role_url)
    exists = await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", url.username)
    verb = "ALTER" if exists else "CREATE"
    await _execute_formatted(connection, verb + " ROLE %1$I LOGIN PASSWORD %2$L", url.username, url.password)
    database = await connection.fetchval("SELECT current_database()")
    await _execute_formatted(connection, "GRANT CONNECT ON DATABASE %1$I TO %2$I", database, url.username)
    return str(url.username)


async def _execute_formatted(connection: asyncpg.Connection, template: str, *names: str | None) -> None:
    """Run a statement that takes no parameters, such as GRANT, with names quoted by PostgreSQL's own format()."""
    statement = await connection.fetchval("SELECT format($1, VARIADIC $2::text[])", template, list(names))
    await connection.execute(statement)


def run_migrations(tables: MetaData) -> None:
    """What every migrations/env.py calls: run Alembic online against the configured URL."""
    from alembic import context

    url = context.config.attributes.get("url") or _url_from_environment()

    def run(connection: Connection) -> None:
        context.configure(
            connection=connection,
            target_metadata=tables,
            version_table_schema=tables.schema,
            include_schemas=True,
            include_name=lambda name, type_, _parents: type_ != "schema" or name == tables.schema,
            include_object=_is_ours,
            compare_type=True,
            compare_server_default=True,
            transaction_per_migration=True,
        )
        with context.begin_transaction():
            context.run_migrations()

    async def main() -> None:
        engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), poolclass=pool.NullPool)
        try:
            async with engine.connect() as connection:
                driver = (await connection.get_raw_connection()).driver_connection
                await _lock_migrations(driver)
                await connection.run_sync(run)
        finally:
            await engine.dispose()

    asyncio.run(main())


def _is_ours(_object: Any, name: str | None, type_: str, _reflected: bool, _compare_to: Any) -> bool:
    return not (type_ == "table" and name == "alembic_version")


def _url_from_environment() -> str:
    url = os.environ.get("TOLLGATE_DATABASE_URL")
    if not url:
        raise SystemExit("Set TOLLGATE_DATABASE_URL to the owner's URL of the database to migrate.")
    return url
