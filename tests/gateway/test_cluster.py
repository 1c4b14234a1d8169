"""The gateway on a real Redis Cluster, told of changes by auth's own client of it."""

import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest
import pytest_asyncio
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError

from services.auth.clients import ChangeChannel
from services.auth.errors import RedisDown
from shared.apikeys import USAGE_STREAM
from shared.cache import create_redis
from tests.gateway.harness import Backend, Directory, Gateway, Key, gateway, settings
from tests.gateway.outages import eventually
from tests.shared.valkey_cluster import ValkeyCluster, own_cluster


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    with own_cluster() as running:
        yield running


@pytest_asyncio.fixture
async def client(cluster: ValkeyCluster) -> AsyncIterator[RedisCluster]:
    # A busy test machine is not an outage.
    made = create_redis(cluster.url, client_name="test", timeout_ms=20_000, connect_timeout_ms=20_000)
    assert isinstance(made, RedisCluster)
    yield made
    await made.aclose()


@pytest_asyncio.fixture
async def on_cluster(cluster: ValkeyCluster, database_url: str, backend: Backend) -> AsyncIterator[Gateway]:
    async with gateway(settings(cluster.url, database_url, backend.url)) as running:
        yield running


async def test_keys_limits_revocations_and_events_work_on_every_node(
    on_cluster: Gateway, directory: Directory, client: RedisCluster, cluster: ValkeyCluster
) -> None:
    told = Directory(directory.connection, client)
    keys = [await told.create_key(limits={"minute": 3, "concurrency": 2}) for _ in range(6)]
    await on_cluster.ready(redis="ok")

    async def is_revoked(key: Key) -> bool:
        status = (await on_cluster.http.get("/v1/models", headers=key.headers)).status_code
        assert status in {401, 429}
        return status == 401

    for key in keys:
        statuses = [(await on_cluster.http.get("/v1/models", headers=key.headers)).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        await told.revoke(key)
        # Its refusal is remembered until the news is here: refused all the same, as one over its limit.
        await eventually(partial(is_revoked, key))
    assert len({cluster.primary_of(f"{{{key.org_id}}}:x").port for key in keys}) > 1
    assert await on_cluster.metric("tollgate_gateway_key_lookups_total", source="postgres") == 12

    async def are_written() -> bool:
        return int(await client.xlen(USAGE_STREAM)) >= 30

    await eventually(are_written)


async def test_a_cluster_without_a_majority_is_as_good_as_no_redis(
    directory: Directory, cluster: ValkeyCluster, database_url: str, backend: Backend
) -> None:
    """CLUSTERDOWN: keys from PostgreSQL, limits in this process; and Redis decides again when it is back."""
    survivor = next(node for node in cluster.nodes if node.is_primary)
    key = next(
        key
        for key in [await directory.create_key(limits={"minute": 3}) for _ in range(40)]
        if cluster.primary_of(f"{{{key.org_id}}}:x") is survivor
    )
    others = [node for node in cluster.nodes if node is not survivor]
    async with gateway(settings(cluster.url, database_url, backend.url, gateway_redis_timeout_ms=2_000)) as running:
        for node in others:
            node.signal(signal.SIGSTOP)
        await eventually(lambda: "cluster_state:fail" in survivor.ask("CLUSTER", "INFO"))
        with pytest.raises(RedisError, match="cluster is down"):
            survivor.ask("GET", f"{{{key.org_id}}}:x")
        statuses = [(await running.http.get("/v1/models", headers=key.headers)).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        for node in others:
            node.signal(signal.SIGCONT)

        async def is_counted_there() -> bool:
            await running.http.get("/v1/models", headers=key.headers)
            primary = cluster.primary_of(f"{{{key.org_id}}}:x")
            return bool(primary.ask("KEYS", f"{{{key.org_id}}}:limit:*"))

        await eventually(is_counted_there)


async def test_auth_notices_that_another_server_answers(client: RedisCluster, cluster: ValkeyCluster) -> None:
    channel = ChangeChannel(client)
    before = await channel.server()
    assert before == await channel.server()
    cluster.primary_of("x").kill()

    async def answers_otherwise() -> bool:
        with contextlib.suppress(RedisDown):
            now = await channel.server()
            return now != before and len(now.split()) == 3
        return False

    await eventually(answers_otherwise, 60)
