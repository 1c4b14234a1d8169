"""A long history is looked up by index alone: no query of a person reads a large table from end to end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from bench.ledger import books
from deploy.local.postgres import SUPERUSER
from services.billing.repository import history, wallets
from services.billing.repository.history import TransactionFilter
from shared.database import dsn
from tests.billing.harness import MODEL, ROLE, ledger_on, migrate
from tests.conftest import Components, FreshDatabase, role_url, with_database

WALLETS, REQUESTS = 40, 12_000
# What grows with every request. A partition that has no rows yet, or a table of few wallets, may be read in whole.
LARGE = {"transfer_first", "usage_first", "hold", *(f"op_{n:02d}" for n in range(16))}


class Explained:
    """Stands in for `Database`: answers as it does, and keeps the plans of what was asked."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.plans: list[dict[str, Any]] = []

    async def fetch(self, query: str, *arguments: object) -> list[Any]:
        text = await self._connection.fetchval(f"EXPLAIN (FORMAT JSON) {query}", *arguments)
        self.plans.append(json.loads(text)[0]["Plan"])
        rows: list[Any] = await self._connection.fetch(query, *arguments)
        return rows

    async def fetchrow(self, query: str, *arguments: object) -> Any:
        return next(iter(await self.fetch(query, *arguments)), None)

    def nodes(self) -> Iterator[dict[str, Any]]:
        pending = list(self.plans)
        while pending:
            node = pending.pop()
            pending += node.get("Plans", [])
            yield node

    def read_in_whole(self) -> set[str]:
        return {n["Relation Name"] for n in self.nodes() if n["Node Type"] == "Seq Scan"} & LARGE


@pytest.fixture(scope="module")
def full_url(fresh_database: FreshDatabase, components: Components) -> str:
    """A database with wallets of a few hundred requests each."""
    url = fresh_database("volume", migrate=migrate)
    database = url.rsplit("/", 1)[1]
    superuser_url = with_database(components.postgres.url(user=SUPERUSER), database)

    async def fill() -> None:
        async with ledger_on(url):  # publishes the price
            pass
        filled = await books.add_wallets(superuser_url, WALLETS)
        await books.add_requests(superuser_url, filled, REQUESTS, MODEL)
        connection = await asyncpg.connect(dsn(superuser_url))
        await connection.execute("VACUUM ANALYZE")
        await connection.close()

    asyncio.run(fill())
    return url


@asynccontextmanager
async def explained(url: str) -> AsyncIterator[tuple[Any, UUID]]:
    """The service's role, and a wallet."""
    connection = await asyncpg.connect(dsn(role_url(url, ROLE)))
    try:
        yield Explained(connection), await connection.fetchval("SELECT id FROM billing.wallet LIMIT 1")
    finally:
        await connection.close()


async def test_a_page_of_transactions_reads_no_table_in_whole(full_url: str) -> None:
    async with explained(full_url) as (database, org_id):
        for wanted in (TransactionFilter(), TransactionFilter(kinds=("grant",), model=MODEL)):
            for newest_first in (True, False):
                rows = await history.transactions(
                    database, org_id, wanted, after=100, until=250, limit=20, newest_first=newest_first
                )
        assert len(await history.transactions(database, org_id, TransactionFilter(), after=0, until=300, limit=9)) == 9
        assert rows == []
        assert database.read_in_whole() == set()
        used = {n["Index Name"] for n in database.nodes() if n.get("Relation Name") == "transfer_first"}
        assert used == {"uq_transfer_wallet_id_wallet_seq"}


async def test_a_page_of_usage_reads_no_table_in_whole(full_url: str) -> None:
    async with explained(full_url) as (database, org_id):
        page = await history.usage(database, org_id, before=None, limit=20)
        following = await history.usage(database, org_id, before=(page[-1].hold_id, page[-1].part), limit=20)
        assert len(page) == len(following) == 20
        assert database.read_in_whole() == set()


async def test_a_wallet_its_grants_and_its_past_read_no_table_in_whole(full_url: str) -> None:
    async with explained(full_url) as (database, org_id):
        view = await history.wallet(database, org_id)
        assert view is not None
        assert view.spent == REQUESTS // WALLETS * books.USED_TOKENS
        assert await wallets.grants(database, org_id, all_of_them=True, limit=10)
        now = await wallets.balance_at(database, org_id, None)
        assert now is not None
        assert now.balance == view.balance
        before = await wallets.balance_at(database, org_id, datetime.now(UTC) - timedelta(days=1))
        assert before is not None
        assert before.balance == 0
        assert database.read_in_whole() == set()


async def test_books_written_in_bulk_add_up(full_url: str) -> None:
    async with ledger_on(full_url) as ledger:
        report = await ledger.verified()
        assert (report.wallets, report.holds, report.transfers) == (WALLETS, REQUESTS, REQUESTS + WALLETS)
