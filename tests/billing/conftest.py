"""Billing over real PostgreSQL. `ledger` is the writer on a database of the test module; `app` the whole service."""

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from tests.billing.harness import App, Ledger, ledger_on, migrate, running
from tests.conftest import FreshDatabase


@pytest.fixture(scope="module")
def owner_url(fresh_database: FreshDatabase) -> str:
    """A migrated database of this module's own; its owner's URL."""
    return fresh_database("billing", migrate=migrate)


@pytest.fixture
def lonely_url(fresh_database: FreshDatabase) -> str:
    """A migrated database of this test's own: no other process shares its shards."""
    return fresh_database("lonely", migrate=migrate)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def ledger(owner_url: str) -> AsyncIterator[Ledger]:
    async with ledger_on(owner_url) as ledger:
        yield ledger


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def app(owner_url: str, ledger: Ledger) -> AsyncIterator[App]:
    """After `ledger`, which has published the price."""
    async with running(owner_url) as app:
        yield app


@pytest.fixture
def org_id() -> UUID:
    """An organisation that nobody has seen before."""
    return uuid4()
