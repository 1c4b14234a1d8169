"""The tables that grow are partitioned: turned over in place under load, made ahead, with a default that is no trap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from alembic import command

from services.billing.tables import SERVICE_GRANTS
from shared import database
from shared.ids import uuid7
from tests.billing.harness import ROLE, Ledger, grant, ledger_on, migrate, owner, settle
from tests.conftest import FreshDatabase, role_url

BEFORE = "0002"
WALLETS = 20
OPERATIONS_BEFORE = 40
DEADLINE_S = 60

# One operation as version 0002 of the schema has it: remembered, with a transfer, under the wallet's lock.
OPERATION = """
    WITH numbered AS (UPDATE billing.wallet SET seq = seq + 1 WHERE id = $1 RETURNING seq),
    remembered AS (
        INSERT INTO billing.op (tenant, idem_key, id, kind, body_sha256, result, actor, created_at)
        VALUES ($1, 'grant:' || $2::uuid, $2, 'grant', sha256('x'), '{}', 'test', clock_timestamp()))
    INSERT INTO billing.transfer (id, op_id, wallet_id, wallet_seq, debit_account, credit_account, amount, code,
        balance_after, effective_at, booked_at)
    SELECT uuidv7(), $2, $1, seq, $3, $4, 1, 'grant', seq, clock_timestamp(), clock_timestamp() FROM numbered"""


class Writers:
    """Write to plain wallets without end; know what was acknowledged."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.acknowledged: set[UUID] = set()
        self.stopping = asyncio.Event()

    async def run(self, wallet_id: UUID, funding: UUID, grant: UUID) -> None:
        connection = await asyncpg.connect(database.dsn(self._url))
        try:
            while not self.stopping.is_set():
                op_id = uuid7()
                await self._write(connection, wallet_id, op_id, funding, grant)
                self.acknowledged.add(op_id)
                await asyncio.sleep(0)
        finally:
            await connection.close()

    async def _write(self, connection: Any, *values: UUID) -> None:
        """As the service does: a statement that a migration made stale is sent again."""
        for _ in range(10):
            try:
                async with connection.transaction():
                    await connection.execute("SELECT FROM billing.wallet WHERE id = $1 FOR UPDATE", values[0])
                    await connection.execute(OPERATION, *values)
                return
            except asyncpg.InvalidCachedStatementError:
                continue

    async def written(self, count: int) -> None:
        goal = len(self.acknowledged) + count
        async with asyncio.timeout(DEADLINE_S):
            while len(self.acknowledged) < goal:
                await asyncio.sleep(0.01)


@pytest.fixture
def plain_url(fresh_database: FreshDatabase) -> str:
    """A database as it was before the tables were partitioned."""
    url = fresh_database("plain")
    database.migrate("billing", url, role_url(url, ROLE), revision=BEFORE)
    grants = {name: rights.replace(", version", "") for name, rights in SERVICE_GRANTS.items() if name in EXISTED}
    database.set_grants("billing", url, role_url(url, ROLE), grants)
    return url


EXISTED = ("wallet", "account", "op", "transfer", "usage")


async def plain_wallets(owner_url: str) -> list[tuple[UUID, UUID, UUID]]:
    """Wallets with a funding and a grant's account each."""
    wallets = [(uuid4(), uuid4(), uuid4()) for _ in range(WALLETS)]
    connection = await owner(owner_url)
    try:
        for wallet_id, funding, grant in wallets:
            await connection.execute("INSERT INTO billing.wallet VALUES ($1, 0, NULL, now(), now())", wallet_id)
            for account_id, kind in ((funding, "funding"), (grant, "grant")):
                await connection.execute(
                    "INSERT INTO billing.account VALUES ($1, $2, $3, $3 = 'grant', 0, 0, 0, 0)",
                    account_id,
                    wallet_id,
                    kind,
                )
    finally:
        await connection.close()
    return wallets


async def test_tables_are_turned_over_while_writers_write(plain_url: str) -> None:
    writers = Writers(role_url(plain_url, ROLE))
    async with asyncio.TaskGroup() as tasks:
        for wallet in await plain_wallets(plain_url):
            tasks.create_task(writers.run(*wallet))
        await writers.written(OPERATIONS_BEFORE)
        await asyncio.to_thread(database.migrate, "billing", plain_url, role_url(plain_url, ROLE))
        await writers.written(OPERATIONS_BEFORE)
        writers.stopping.set()
    connection = await owner(plain_url)
    try:
        transfers = await connection.fetch("SELECT op_id FROM billing.transfer")
        assert sorted(row[0] for row in transfers) == sorted(writers.acknowledged)
        assert sorted(row[0] for row in await connection.fetch("SELECT id FROM billing.op")) == sorted(
            writers.acknowledged
        )
        gaps = """SELECT w.id FROM billing.wallet w LEFT JOIN billing.transfer t ON t.wallet_id = w.id GROUP BY w.id
            HAVING count(t.id) <> w.seq OR max(t.wallet_seq) <> w.seq"""
        assert await connection.fetch(gaps) == []
        kinds = "SELECT relkind FROM pg_class WHERE oid = ANY($1::regclass[])"
        found = await connection.fetch(kinds, ["billing.transfer", "billing.usage", "billing.op"])
        assert [row[0] for row in found] == [b"p"] * 3
    finally:
        await connection.close()


async def test_the_way_back_keeps_the_rows(fresh_database: FreshDatabase) -> None:
    url = fresh_database("back")
    await asyncio.to_thread(database.migrate, "billing", url, role_url(url, ROLE), revision=BEFORE)
    [(wallet_id, funding, grant)] = (await plain_wallets(url))[:1]
    connection = await owner(url)
    try:
        for _ in range(3):
            await connection.execute(OPERATION, wallet_id, uuid7(), funding, grant)
        rows = "SELECT * FROM billing.transfer ORDER BY id"
        operations = "SELECT * FROM billing.op ORDER BY id"
        before = await connection.fetch(rows), await connection.fetch(operations)
        for revision in ("0003", BEFORE):
            go = command.upgrade if revision > BEFORE else command.downgrade
            await asyncio.to_thread(go, database.alembic_config("billing", url), revision)
            await connection.reload_schema_state()
            assert (await connection.fetch(rows), await connection.fetch(operations)) == before
    finally:
        await connection.close()


@pytest.fixture
def migrated_url(fresh_database: FreshDatabase) -> str:
    return fresh_database("months", migrate=migrate)


@pytest.fixture
async def untouched(migrated_url: str) -> AsyncIterator[Ledger]:
    """A ledger whose partitions are those of the migration."""
    async with ledger_on(migrated_url) as ledger:
        yield ledger


async def test_months_are_made_ahead_and_only_once(untouched: Ledger) -> None:
    count = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'billing.transfer'::regclass"
    months = "SELECT horizon, strays FROM billing.make_partitions($1)"
    before = await untouched.pool.fetchval(count)
    horizon, strays = await untouched.pool.fetchrow(months, 6)
    made = await untouched.pool.fetchval(count) - before
    assert made == 3
    assert strays == 0
    assert timedelta(days=6 * 30) < horizon - datetime.now(UTC) < timedelta(days=7 * 31)
    assert tuple(await untouched.pool.fetchrow(months, 6)) == (horizon, 0)
    assert await untouched.pool.fetchval(count) - before == made


async def test_months_are_made_while_operations_go_on(untouched: Ledger) -> None:
    stopping = asyncio.Event()

    async def customer(org_id: UUID) -> int:
        await untouched.writer.submit(grant(org_id, 10**9))
        done = 0
        while not stopping.is_set():
            held = await untouched.held(org_id, 10)
            await untouched.writer.submit(settle(org_id, held.hold_id, 4))
            done += 1
        return done

    async with asyncio.TaskGroup() as group:
        customers = [group.create_task(customer(uuid4())) for _ in range(8)]
        for months in range(4, 10):
            await untouched.pool.fetchrow("SELECT * FROM billing.make_partitions($1)", months)
        stopping.set()
    assert all(customer.result() > 0 for customer in customers)
    await untouched.verified()


@pytest.mark.parametrize("months", [0, -1, 25, 100_000])
async def test_the_service_cannot_ask_for_any_number_of_tables(ledger: Ledger, months: int) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError):
        await ledger.pool.fetch("SELECT billing.make_partitions($1)", months)


@pytest.mark.parametrize("table", ["transfer_first", "usage_first", "op_00", "transfer_default"])
async def test_the_services_role_does_not_reach_a_partition(ledger: Ledger, table: str) -> None:
    for statement in ("SELECT FROM", "DELETE FROM", "TRUNCATE"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await ledger.pool.execute(f"{statement} billing_partition.{table}")


async def test_every_partition_refuses_changes_of_the_owner_too(ledger: Ledger) -> None:
    connection = await owner(ledger.owner_url)
    try:
        partitions = await connection.fetch(
            """SELECT c.oid::regclass::text FROM pg_class c
            WHERE c.relnamespace = 'billing_partition'::regnamespace AND c.relkind = 'r'"""
        )
        assert len(partitions) > 20
        for (name,) in partitions:
            for change in (f"DELETE FROM {name}", f"TRUNCATE {name}", f"UPDATE {name} SET created_at = now()"):
                with pytest.raises((asyncpg.RestrictViolationError, asyncpg.UndefinedColumnError)):
                    await connection.execute(change)
    finally:
        await connection.close()


async def test_rows_of_a_clock_that_ran_ahead_move_into_their_month_when_it_is_made(
    untouched: Ledger, org_id: UUID
) -> None:
    """They go to the default partition first; making their month must neither fail nor lose them."""
    future = datetime.now(UTC) + timedelta(days=365)
    hold_id = uuid7(int(future.timestamp() * 1000))
    await untouched.held(org_id, 10, hold_id=hold_id)
    await untouched.writer.submit(settle(org_id, hold_id, 4))
    where = "SELECT tableoid::regclass::text FROM billing.usage WHERE hold_id = $1"
    assert await untouched.pool.fetchval(where, hold_id) == "billing_partition.usage_default"
    _, strays = await untouched.pool.fetchrow("SELECT * FROM billing.make_partitions(11)")
    assert strays == 1
    _, strays = await untouched.pool.fetchrow("SELECT * FROM billing.make_partitions(13)")
    assert strays == 0
    assert await untouched.pool.fetchval(where, hold_id) == f"billing_partition.usage_{future:%Y_%m}"
    assert (await untouched.wallet(org_id)).spent == 4
    await untouched.verified()
