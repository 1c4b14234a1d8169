"""Auth over real PostgreSQL and Valkey: `auth` is the application of a test module."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.auth.harness import Auth, migrate, running
from tests.conftest import Components, FreshDatabase


@pytest.fixture(scope="module")
def owner_url(fresh_database: FreshDatabase) -> str:
    """A migrated database of this module's own; its owner's URL."""
    return fresh_database("auth", migrate=migrate)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def auth(owner_url: str, components: Components) -> AsyncIterator[Auth]:
    async with running(owner_url, components.redis_url) as app:
        yield app
