"""With Redis or PostgreSQL away, keys and limits hold; with both away, nobody passes; health stays up throughout."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.gateway.harness import Backend, Directory, Gateway, Key, gateway, settings
from tests.gateway.outages import TcpSwitch, Valkey, eventually, own_valkey
from tests.gateway.signing import Tokens

# Long enough that a busy machine is not taken for an outage.
NOTICES = {"gateway_redis_timeout_ms": 2_000, "gateway_heartbeat_interval_s": 0.1, "gateway_heartbeat_ttl_s": 60}


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with own_valkey() as server:
        yield server


@pytest_asyncio.fixture
async def postgres(database_url: str) -> AsyncIterator[TcpSwitch]:
    switch = TcpSwitch(database_url)
    await switch.open()
    yield switch
    await switch.cut()


@pytest_asyncio.fixture
async def exposed(valkey: Valkey, postgres: TcpSwitch, backend: Backend) -> AsyncIterator[Gateway]:
    """A gateway whose Redis and PostgreSQL can be taken away. It would notice a frozen Redis sooner in production."""
    configured = settings(valkey.url, postgres.url, backend.url, **NOTICES)
    async with gateway(configured) as running:
        yield running


async def statuses(gateway: Gateway, headers: dict[str, str], count: int) -> list[int]:
    return [(await gateway.http.get("/v1/models", headers=headers)).status_code for _ in range(count)]


@pytest.mark.parametrize("outage", ["killed", "frozen"])
async def test_without_redis_keys_and_limits_hold(
    exposed: Gateway, valkey: Valkey, directory: Directory, outage: str
) -> None:
    warm = await directory.create_key(limits={"minute": 5})
    cold = await directory.create_key(limits={"minute": 5})
    revoked = await directory.create_key()
    expired = await directory.create_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert await statuses(exposed, warm.headers, 2) == [200, 200]
    assert await statuses(exposed, revoked.headers, 1) == [200]
    valkey.kill() if outage == "killed" else valkey.signal(signal.SIGSTOP)
    await directory.revoke(revoked, announce=False)
    assert await statuses(exposed, revoked.headers, 2) == [401, 401]
    assert await statuses(exposed, expired.headers, 1) == [401]
    assert await statuses(exposed, warm.headers, 7) == [200] * 5 + [429] * 2  # at most the limit once more
    assert await statuses(exposed, cold.headers, 7) == [200] * 5 + [429] * 2
    refused = await exposed.http.get("/v1/models", headers=cold.headers)
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert (await exposed.http.get("/healthz")).status_code == 200
    ready = await exposed.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert ready.json()["checks"]["redis"] != "ok"


@pytest.mark.parametrize("fault", ["full", "read-only"])
async def test_a_redis_that_answers_but_cannot_write_is_as_good_as_none(
    exposed: Gateway, valkey: Valkey, directory: Directory, fault: str
) -> None:
    warm = await directory.create_key(limits={"minute": 5})
    cold = await directory.create_key(limits={"minute": 5})
    revoked = await directory.create_key()
    assert await statuses(exposed, warm.headers, 2) == [200, 200]
    assert await statuses(exposed, revoked.headers, 1) == [200]
    async with Redis.from_url(valkey.url) as own:
        if fault == "full":
            await own.config_set("maxmemory", 1)
        else:
            await own.replicaof("127.0.0.1", "1")
        await directory.revoke(revoked, announce=False)
        assert await statuses(exposed, cold.headers, 7) == [200] * 5 + [429] * 2
        assert await statuses(exposed, warm.headers, 7) == [200] * 5 + [429] * 2
        assert await statuses(exposed, revoked.headers, 1) == [401]
        if fault == "full":
            await own.config_set("maxmemory", 0)
        else:
            await own.replicaof("NO", "ONE")
        assert await statuses(exposed, cold.headers, 6) == [200] * 5 + [429]


async def test_without_redis_a_revocation_counts_though_an_older_read_still_runs(
    exposed: Gateway, valkey: Valkey, postgres: TcpSwitch, directory: Directory
) -> None:
    key = await directory.create_key()
    assert await statuses(exposed, key.headers, 1) == [200]
    valkey.kill()
    postgres.hold_replies()
    before = asyncio.create_task(statuses(exposed, key.headers, 1))
    await eventually(lambda: postgres.held > 0)  # its read saw the key as it was
    await directory.revoke(key, announce=False)
    after = asyncio.create_task(statuses(exposed, key.headers, 1))

    async def both_wait() -> bool:
        return await exposed.metric("tollgate_http_requests_in_flight") == 2

    await eventually(both_wait)
    postgres.release_replies()
    assert await after == [401]
    assert await before == [200]


async def test_when_redis_comes_back_it_decides_again(exposed: Gateway, valkey: Valkey, directory: Directory) -> None:
    key = await directory.create_key(limits={"minute": 3})
    assert await statuses(exposed, key.headers, 3) == [200] * 3
    valkey.signal(signal.SIGSTOP)
    assert await statuses(exposed, key.headers, 4) == [200] * 3 + [429]
    valkey.signal(signal.SIGCONT)
    await exposed.ready(redis="ok")
    assert await statuses(exposed, key.headers, 1) == [429]
    valkey.kill()
    valkey.start()
    await exposed.ready(redis="ok")
    assert await statuses(exposed, key.headers, 4) == [200] * 3 + [429]


async def test_live_gateways_share_the_limit_when_redis_goes(
    exposed: Gateway, valkey: Valkey, postgres: TcpSwitch, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key(limits={"minute": 9})
    configured = settings(valkey.url, postgres.url, backend.url, **NOTICES)
    async with gateway(configured) as other, Redis.from_url(valkey.url) as redis:

        async def beats() -> dict[bytes, float]:
            scores: Any = await redis.zrange("tollgate:gateways", 0, -1, withscores=True)
            return dict(scores)

        async def both_beat() -> bool:
            return len(await beats()) == 2

        await eventually(both_beat)
        for _ in range(2):  # the second beat of each shows that it has read the reply to the first
            before = await beats()

            async def both_beat_again(before: dict[bytes, float] = before) -> bool:
                now = await beats()
                return all(now[name] > at for name, at in before.items())

            await eventually(both_beat_again)
        valkey.kill()
        outcomes = await statuses(exposed, key.headers, 9) + await statuses(other, key.headers, 9)
    assert outcomes.count(200) == 8


async def test_gateways_that_start_without_redis_share_the_limit_as_configured(
    valkey: Valkey, database_url: str, backend: Backend, directory: Directory
) -> None:
    valkey.kill()
    key = await directory.create_key(limits={"minute": 9})
    configured = settings(valkey.url, database_url, backend.url, gateway_replicas=3)
    async with gateway(configured, there=("postgres",)) as running:
        assert await statuses(running, key.headers, 4) == [200] * 3 + [429]
        valkey.start()
        await running.ready(redis="ok")

        async def has_beaten() -> bool:
            return await running.metric("tollgate_gateway_redis_up") == 1

        await eventually(has_beaten)
        valkey.kill()  # it was alone
        assert await statuses(running, key.headers, 7) == [200] * 6 + [429]


async def test_without_postgresql_known_keys_work(exposed: Gateway, postgres: TcpSwitch, directory: Directory) -> None:
    known, unknown = await directory.create_key(), await directory.create_key()
    assert await statuses(exposed, known.headers, 1) == [200]
    await postgres.cut()
    assert await statuses(exposed, known.headers, 3) == [200] * 3
    response = await exposed.http.get("/v1/models", headers=unknown.headers)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert (await exposed.http.get("/readyz")).json()["status"] == "degraded"
    await postgres.open()
    assert await statuses(exposed, unknown.headers, 1) == [200]


async def test_a_postgresql_that_talks_nonsense_is_as_good_as_none(
    exposed: Gateway, postgres: TcpSwitch, directory: Directory
) -> None:
    key = await directory.create_key()
    postgres.corrupts_rows = True
    response = await exposed.http.get("/v1/models", headers=key.headers)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "service_unavailable")
    postgres.corrupts_rows = False
    assert await statuses(exposed, key.headers, 1) == [200]


async def test_without_both_nobody_passes(
    exposed: Gateway, valkey: Valkey, postgres: TcpSwitch, directory: Directory, backend: Backend
) -> None:
    key = await directory.create_key()
    assert await statuses(exposed, key.headers, 1) == [200]
    await postgres.cut()
    valkey.kill()
    seen = len(backend.seen)
    response = await exposed.http.get("/v1/models", headers=key.headers)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "service_unavailable")
    assert len(backend.seen) == seen
    assert (await exposed.http.get("/healthz")).status_code == 200
    assert (await exposed.http.get("/readyz")).status_code == 503
    valkey.start()
    await postgres.open()
    await exposed.ready(redis="ok", postgres="ok")
    assert await statuses(exposed, key.headers, 1) == [200]


@pytest.mark.parametrize("redis", ["there", "frozen", "killed"])
async def test_a_frozen_postgresql_costs_its_time_limit(
    valkey: Valkey, postgres: TcpSwitch, backend: Backend, directory: Directory, redis: str
) -> None:
    """A cold key is told so; a warm one goes on as long as Redis is there."""
    warm, cold = await directory.create_key(), await directory.create_key()
    configured = settings(valkey.url, postgres.url, backend.url, **NOTICES, gateway_database_timeout_ms=500)
    async with gateway(configured) as running:
        await eventually(lambda: _answers(running, warm))
        postgres.hold_replies()
        if redis != "there":
            valkey.kill() if redis == "killed" else valkey.signal(signal.SIGSTOP)
        asked = [asyncio.create_task(statuses(running, key.headers, 1)) for key in (warm, cold, cold)]
        answers = [status for [status] in await asyncio.gather(*asked)]
        assert answers == [200 if redis == "there" else 503, 503, 503]
        assert (await running.http.get("/healthz")).status_code == 200
        postgres.release_replies()
        if redis == "frozen":
            valkey.signal(signal.SIGCONT)


async def _answers(running: Gateway, key: Key) -> bool:
    return await statuses(running, key.headers, 1) == [200]


async def test_a_gateway_starts_with_nothing_there(
    valkey: Valkey, postgres: TcpSwitch, backend: Backend, directory: Directory
) -> None:
    valkey.kill()
    await postgres.cut()
    async with gateway(settings(valkey.url, postgres.url, backend.url), there=()) as running:
        assert (await running.http.get("/healthz")).status_code == 200
        assert (await running.http.get("/readyz")).status_code == 503
        valkey.start()
        await postgres.open()
        await running.ready(redis="ok", postgres="ok")
        key = await directory.create_key()
        assert await statuses(running, key.headers, 1) == [200]


async def test_tokens_are_checked_in_postgresql_while_redis_is_away_and_nowhere_else(
    exposed: Gateway, valkey: Valkey, postgres: TcpSwitch, backend: Backend, directory: Directory
) -> None:
    session = await directory.create_session()
    tokens = Tokens(session)
    backend.handlers["/.well-known/jwks.json"] = tokens.serve
    headers = {"authorization": f"Bearer {tokens.sign()}"}

    async def works() -> bool:
        return await statuses(exposed, headers, 1) == [200]

    await eventually(works)
    valkey.kill()
    assert await statuses(exposed, headers, 3) == [200] * 3
    await directory.end_session(session, announce=False)
    assert await statuses(exposed, headers, 2) == [401] * 2
    await postgres.cut()
    assert await statuses(exposed, headers, 1) == [503]


async def test_usage_events_are_counted_when_they_are_lost(
    exposed: Gateway, valkey: Valkey, directory: Directory
) -> None:
    key = await directory.create_key()
    valkey.kill()
    await statuses(exposed, key.headers, 3)

    async def counted() -> bool:
        return await exposed.metric("tollgate_gateway_usage_events_lost_total") == 3

    await eventually(counted)
