"""The schema: migrations, models, the way back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import asyncpg
from alembic import command
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from services.billing.tables import tables
from shared.database import alembic_config, dsn
from tests.billing.harness import ROOT, migrate
from tests.conftest import FreshDatabase

STRUCTURE = """
    SELECT 'column', c.relname || '.' || a.attname,
           format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' ' || a.attidentity::text || ' '
           || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'billing'::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0
        AND c.relname <> 'alembic_version'
    UNION ALL
    SELECT 'table', relname, concat(array_to_string(reloptions, ' '), pg_get_partkeydef(oid)) FROM pg_class
    WHERE relnamespace = 'billing'::regnamespace AND relkind IN ('r', 'p') AND relname <> 'alembic_version'
    UNION ALL
    SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'billing'::regnamespace AND conrelid <> 0 AND contype <> 't' AND conname !~ 'alembic_version'
    UNION ALL
    SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'billing' AND indexname !~ 'alembic_version'
"""


async def structure(url: str) -> set[tuple[str | None, ...]]:
    connection = await asyncpg.connect(dsn(url))
    try:
        return {tuple(row) for row in await connection.fetch(STRUCTURE)}
    finally:
        await connection.close()


def test_alembic_finds_no_difference_between_migrations_and_models(owner_url: str) -> None:
    alembic = str(Path(sys.executable).parent / "alembic")
    checked = subprocess.run(
        [alembic, "-n", "billing", "check"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "TOLLGATE_DATABASE_URL": owner_url},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "No new upgrade operations" in checked.stdout


def test_migrating_twice_changes_nothing(fresh_database: FreshDatabase) -> None:
    url = fresh_database("billing")
    migrate(url)
    first = asyncio.run(structure(url))
    migrate(url)
    assert asyncio.run(structure(url)) == first


def test_the_way_back_leaves_an_empty_schema(fresh_database: FreshDatabase) -> None:
    url = fresh_database("billing")
    migrate(url)
    command.downgrade(alembic_config("billing", url), "base")
    assert not asyncio.run(structure(url))
    migrate(url)


async def test_the_models_say_exactly_what_the_migrations_make(owner_url: str, fresh_database: FreshDatabase) -> None:
    """Alembic's check compares neither CHECK constraints nor names; PostgreSQL's own descriptions do."""
    url = fresh_database("models")
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE SCHEMA billing")
        await connection.run_sync(tables.create_all)
    await engine.dispose()
    assert await structure(url) == await structure(owner_url)
