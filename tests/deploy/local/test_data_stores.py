"""The data stores that the fixtures start are the real ones, with the settings that the design asks for."""

import functools

from deploy.local.postgres import OWNER
from tests.conftest import Components, FreshDatabase


def test_postgres_is_18_with_fsync_and_vector(components: Components) -> None:
    sql = "SELECT current_setting('server_version_num')::int / 10000, current_setting('fsync')"
    assert components.postgres.execute(sql) == "18|on"
    available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'"
    assert components.postgres.execute(available) == "1"


def test_fresh_databases_are_separate(components: Components, fresh_database: FreshDatabase) -> None:
    first, second = fresh_database("one"), fresh_database("one")
    assert first != second


def test_migration_runs_once_and_is_cloned(components: Components, fresh_database: FreshDatabase) -> None:
    def migrate(url: str) -> None:
        calls.append(url)
        components.postgres.execute("CREATE TABLE kept (n int)", database=url.rpartition("/")[2])

    calls: list[str] = []
    urls = [fresh_database("cloned", migrate) for _ in range(2)]
    assert len(calls) == 1
    for url in urls:
        assert components.postgres.execute("SELECT count(*) FROM kept", database=url.rpartition("/")[2]) == "0"


def test_owner_makes_roles_and_schemas_but_is_no_superuser(
    fresh_database: FreshDatabase, components: Components
) -> None:
    database = fresh_database("owner").rpartition("/")[2]
    as_owner = functools.partial(components.postgres.execute, user=OWNER, database=database)
    as_owner("CREATE ROLE tollgate_probe LOGIN PASSWORD 'x'; CREATE SCHEMA probe; DROP ROLE tollgate_probe")
    as_owner("CREATE EXTENSION IF NOT EXISTS vector")
    assert as_owner("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == "f"
