"""Fixtures of the gateway's tests; what they hand out is described in harness.py."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.conftest import Components, FreshDatabase, role_url
from tests.gateway import harness
from tests.gateway.harness import Backend, Directory, Gateway


@pytest.fixture(scope="module")
def owner_url(fresh_database: FreshDatabase) -> str:
    return fresh_database("gateway", migrate=harness.migrate)


@pytest.fixture(scope="module")
def database_url(owner_url: str) -> str:
    """As the gateway's own role."""
    return role_url(owner_url, "tollgate_gateway")


@pytest_asyncio.fixture
async def redis(components: Components) -> AsyncIterator[Redis]:
    async with Redis.from_url(components.redis_url) as client:
        yield client


@pytest_asyncio.fixture
async def directory(owner_url: str, redis: Redis) -> AsyncIterator[Directory]:
    connection = await harness.connect(owner_url)
    try:
        yield Directory(connection, redis)
    finally:
        await connection.close()


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[Backend]:
    async with harness.backend() as app:
        yield app


@pytest_asyncio.fixture
async def gateway(components: Components, database_url: str, backend: Backend) -> AsyncIterator[Gateway]:
    async with harness.gateway(harness.settings(components.redis_url, database_url, backend.url)) as running:
        yield running
