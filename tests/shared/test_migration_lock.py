"""Services that migrate at the same time: one after another, and none in another's way."""

import asyncio

import asyncpg

from shared.database import MIGRATION_LOCK_ID, dsn, ensure_role
from tests.conftest import FreshDatabase, role_url

TIMEOUT_S = 60


async def test_whoever_waits_for_the_lock_does_not_hold_up_a_concurrent_index(fresh_database: FreshDatabase) -> None:
    owner = fresh_database("lock")
    async with asyncio.timeout(TIMEOUT_S):
        migrating = await asyncpg.connect(dsn(owner))
        observer = await asyncpg.connect(dsn(owner))
        try:
            await migrating.execute("CREATE TABLE large (n int)")
            await migrating.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK_ID)
            waiting = asyncio.create_task(asyncio.to_thread(ensure_role, owner, role_url(owner, "lock_waiter")))
            while not await observer.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ~ 'advisory_lock'"
                " AND pid NOT IN (pg_backend_pid(), $1)",
                migrating.get_server_pid(),
            ):
                await asyncio.sleep(0.01)
            await migrating.execute("CREATE INDEX CONCURRENTLY ON large (n)")
            assert not waiting.done()
            await migrating.execute("SELECT pg_advisory_unlock($1)", MIGRATION_LOCK_ID)
            await waiting
            assert await observer.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = 'lock_waiter'") == 1
        finally:
            await migrating.close()
            await observer.close()
