"""The schema: migrations, models, rights."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import asyncpg
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from services.auth.tables import Base
from shared.database import dsn
from tests.auth.harness import migrate
from tests.conftest import FreshDatabase

ROOT = Path(__file__).parents[2]

STRUCTURE = """
    SELECT 'column', c.relname || '.' || a.attname,
           format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' ' || a.attidentity::text || ' '
           || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'auth'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND c.relname <> 'alembic_version'
    UNION ALL
    SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'auth'::regnamespace AND conrelid <> 0 AND conname !~ 'alembic_version'
    UNION ALL
    SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'auth' AND indexname !~ 'alembic_version'
"""


async def structure(url: str) -> set[tuple[str, ...]]:
    connection = await asyncpg.connect(dsn(url))
    try:
        return {tuple(row) for row in await connection.fetch(STRUCTURE)}
    finally:
        await connection.close()


def run(*command: str, url: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "TOLLGATE_DATABASE_URL": url}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


def test_alembic_finds_no_difference_between_migrations_and_models(owner_url: str) -> None:
    alembic = str(Path(sys.executable).parent / "alembic")
    checked = run(alembic, "-n", "auth", "check", url=owner_url)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "No new upgrade operations" in checked.stdout


def test_migrating_twice_changes_nothing(fresh_database: FreshDatabase) -> None:
    url = fresh_database("auth")
    migrate(url)
    first = asyncio.run(structure(url))
    migrate(url)
    assert asyncio.run(structure(url)) == first


async def test_the_models_say_exactly_what_the_migrations_make(owner_url: str, fresh_database: FreshDatabase) -> None:
    """Alembic's check compares neither CHECK constraints nor names; PostgreSQL's own descriptions do."""
    url = fresh_database("models")
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE SCHEMA auth")
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    assert await structure(url) == await structure(owner_url)
