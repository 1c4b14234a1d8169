"""A key works from its first request to its last: what it costs to look one up, and that a revoked one never passes."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from shared import apikeys
from shared.clock import SystemClock
from shared.identity import HEADER, Identity, IdentityRing
from tests.conftest import Components
from tests.gateway.harness import IDENTITY_KEYS, Backend, Directory, Gateway, Key, gateway, settings
from tests.gateway.outages import Valkey, eventually, own_valkey

LOOKUPS = "tollgate_gateway_key_lookups_total"


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with own_valkey() as server:
        yield server


async def test_a_warm_key_costs_one_trip_and_a_cold_one_two(
    gateway: Gateway, directory: Directory, components: Components, database_url: str, backend: Backend
) -> None:
    key = await directory.create_key()
    await gateway.http.get("/v1/models", headers=key.headers)
    assert await gateway.metric(LOOKUPS, source="postgres") == 1
    await gateway.http.get("/v1/models", headers=key.headers)
    assert await gateway.metric(LOOKUPS, source="process") == 1
    async with _another(components, database_url, backend) as other:
        await other.http.get("/v1/models", headers=key.headers)
        assert await other.metric(LOOKUPS, source="redis") == 1
        assert await other.metric(LOOKUPS, source="postgres") == 0


def _another(components: Components, database_url: str, backend: Backend) -> AbstractAsyncContextManager[Gateway]:
    return gateway(settings(components.redis_url, database_url, backend.url))


async def test_junk_reaches_neither_redis_nor_postgresql(valkey: Valkey, database_url: str, backend: Backend) -> None:
    good = apikeys.generate()
    junk = ["x", "tg_live_", good[:-1], good[:-1] + ("0" if good[-1] != "0" else "1"), good + "0", "a.b", "ü" * 40]
    configured = settings(valkey.url, database_url, backend.url, gateway_heartbeat_interval_s=3_600)
    async with gateway(configured) as running, Redis.from_url(valkey.url) as redis:
        await eventually(lambda: _has_beaten(redis))
        before = await _looked(redis)
        for secret in junk:
            response = await running.http.get("/v1/models", headers=[(b"x-api-key", secret.encode())])
            assert response.status_code == 401
        assert await _looked(redis) == before
        assert await running.metric(LOOKUPS, source="postgres") == 0


async def _looked(redis: Redis) -> int:
    """How often anything was read or decided; events of usage are written all the time."""
    stats = await redis.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("get", "mget", "eval", "evalsha"))


async def _has_beaten(redis: Redis) -> bool:
    return bool(await redis.exists("tollgate:gateways"))


async def test_every_401_is_the_same(gateway: Gateway, directory: Directory) -> None:
    revoked = await directory.create_key()
    await directory.revoke(revoked)
    was_good = await directory.create_key()
    assert (await gateway.http.get("/v1/models", headers=was_good.headers)).status_code == 200
    await directory.revoke(was_good)
    expired = await directory.create_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    shown = [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Basic eDp5"},
        {"authorization": "Bearer not.a.token"},
        {"authorization": "Bearer junk"},
        {"authorization": f"Bearer {apikeys.generate()}"},
        revoked.headers,
        was_good.headers,
        expired.headers,
    ]
    answers = set()
    for headers in shown:
        response = await gateway.http.get("/v1/models", headers={**headers, "x-request-id": "same-for-all"})
        lines = sorted((k, v) for k, v in response.headers.items() if k != "date")
        answers.add((response.status_code, str(lines), response.text))
    assert len(answers) == 1
    assert next(iter(answers))[0] == 401


async def test_a_revoked_key_fails_on_its_next_request(gateway: Gateway, directory: Directory) -> None:
    for _ in range(20):
        key = await directory.create_key()
        assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 200
        await directory.revoke(key)
        assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 401


async def test_a_revocation_wins_over_a_fill_that_races_it(gateway: Gateway, directory: Directory) -> None:
    for _ in range(10):
        key = await directory.create_key()
        requests = [asyncio.create_task(gateway.http.get("/v1/models", headers=key.headers)) for _ in range(8)]
        await directory.revoke(key)
        await asyncio.gather(*requests)
        assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 401


async def test_an_emptied_redis_lets_no_revoked_key_through(
    valkey: Valkey, database_url: str, backend: Backend, directory: Directory
) -> None:
    async with (
        gateway(settings(valkey.url, database_url, backend.url)) as running,
        Redis.from_url(valkey.url) as own,
    ):
        good, revoked = await directory.create_key(), await directory.create_key()
        for key in (good, revoked):
            assert (await running.http.get("/v1/models", headers=key.headers)).status_code == 200
        await directory.revoke(revoked, announce=False)
        await own.flushall()
        assert (await running.http.get("/v1/models", headers=revoked.headers)).status_code == 401
        assert (await running.http.get("/v1/models", headers=good.headers)).status_code == 200


async def test_expiry_is_judged_at_use(gateway: Gateway, directory: Directory) -> None:
    for life_s in (1.5, 10, 50):
        key = await directory.create_key(expires_at=datetime.now(UTC) + timedelta(seconds=life_s))

        async def status(key: Key = key) -> int:
            return (await gateway.http.get("/v1/models", headers=key.headers)).status_code

        async def is_refused() -> bool:
            return await status() == 401

        if await status() == 200:  # on a busy machine it may be over before it was ever shown
            await eventually(is_refused)
            return
    raise AssertionError("it never worked")


async def test_changed_limits_take_effect_on_the_next_request(gateway: Gateway, directory: Directory) -> None:
    key = await directory.create_key()
    first = await gateway.http.get("/v1/models", headers=key.headers)
    assert first.headers["x-ratelimit-remaining-requests"] == "59"
    await directory.set_limits(key, {"minute": 2})
    second = await gateway.http.get("/v1/models", headers=key.headers)
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 429


async def test_a_burst_on_a_cold_key_is_one_read(gateway: Gateway, directory: Directory) -> None:
    key = await directory.create_key(limits={"concurrency": 100})
    responses = await asyncio.gather(*(gateway.http.get("/v1/models", headers=key.headers) for _ in range(30)))
    assert {r.status_code for r in responses} == {200}

    async def was_one_connection() -> bool:
        """Those of gateways that have ended go; those of this one stay for minutes."""
        return bool(
            await directory.connection.fetchval(
                "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'tollgate-gateway'"
            )
        )

    await eventually(was_one_connection)


async def test_unknown_keys_are_remembered_and_guessing_is_bounded(
    components: Components, database_url: str, backend: Backend
) -> None:
    configured = settings(
        components.redis_url,
        database_url,
        backend.url,
        gateway_unknown_keys_per_minute=5,
        gateway_negative_cache_entries_max=3,
    )
    async with gateway(configured) as running:
        one = apikeys.generate()
        for _ in range(10):
            response = await running.http.get("/v1/models", headers={"x-api-key": one})
            assert response.status_code == 401
        assert await running.metric(LOOKUPS, source="postgres") == 1
        statuses = []
        for _ in range(10):
            response = await running.http.get("/v1/models", headers={"x-api-key": apikeys.generate()})
            statuses.append(response.status_code)
        assert statuses == [401] * 4 + [429] * 6
        assert 0 < int(response.headers["retry-after"]) <= 60
        assert await running.metric(LOOKUPS, source="postgres") == 5


async def test_a_burst_of_guesses_has_no_more_of_them_than_the_limit(
    components: Components, database_url: str, backend: Backend
) -> None:
    configured = settings(components.redis_url, database_url, backend.url, gateway_unknown_keys_per_minute=5)
    async with gateway(configured) as running:
        shown = [{"x-api-key": apikeys.generate()} for _ in range(30)]
        responses = await asyncio.gather(*(running.http.get("/v1/models", headers=headers) for headers in shown))
        statuses = Counter(response.status_code for response in responses)
        assert statuses == {401: 5, 429: 25}
        assert await running.metric(LOOKUPS, source="postgres") == 5


async def test_a_forged_record_of_a_key_is_not_enough(gateway: Gateway, directory: Directory, redis: Redis) -> None:
    """What stands under a key's name in Redis is only a guess: without the version it is not believed."""
    key = await directory.create_key()
    await directory.revoke(key)
    record = (
        f'{{"v":1,"digest":"{key.digest}","pepper":1,"key_id":"{key.key_id}","limit_id":"{uuid4()}",'
        f'"org_id":"{key.org_id}","user_id":"{key.user_id}","plan":"default","roles":[],"scopes":["*"],'
        f'"models":null,"limits":{{}},"version":1,"status":"active","expires_at":null}}'
    )
    await redis.set(apikeys.record_name(key.digest), record)
    assert (await gateway.http.get("/v1/models", headers=key.headers)).status_code == 401


async def test_a_key_is_good_only_from_its_addresses(
    components: Components, database_url: str, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key(allowed_addresses=["192.0.2.0/24", "2001:db8::/32", "not a network"])
    nowhere = await directory.create_key(allowed_addresses=[])
    configured = settings(components.redis_url, database_url, backend.url, trusted_proxies="127.0.0.0/8")
    async with gateway(configured) as running:
        for _ in range(2):  # from PostgreSQL, then from memory
            for address, expected in (("192.0.2.9", 200), ("2001:db8::9", 200), ("198.51.100.9", 403)):
                headers = {**key.headers, "x-forwarded-for": address}
                response = await running.http.get("/v1/models", headers=headers)
                assert response.status_code == expected, address
        assert response.json()["error"]["code"] == "address_not_allowed"
        assert response.headers["x-ratelimit-remaining-requests"] == "56"  # refused, and nothing drawn
        assert (await running.http.get("/v1/models", headers=nowhere.headers)).status_code == 403
    async with gateway(configured) as another:  # from Redis
        headers = {**key.headers, "x-forwarded-for": "198.51.100.9"}
        assert (await another.http.get("/v1/models", headers=headers)).status_code == 403


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer {}"),
        ("authorization", "bearer  {}"),
        ("authorization", "ApiKey {}"),
        ("authorization", "{}"),
        ("x-api-key", "{}"),
    ],
)
async def test_keys_are_shown_in_several_ways(gateway: Gateway, directory: Directory, name: str, value: str) -> None:
    key = await directory.create_key()
    response = await gateway.http.get("/v1/models", headers={name: value.format(key.secret)})
    assert response.status_code == 200


async def test_an_identity_that_a_client_sends_is_not_believed(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key()
    claimed = Identity(kind="key", user_id="u", org_id="o", scopes=("*",))
    forged = IdentityRing(IDENTITY_KEYS, SystemClock()).sign(claimed)
    shown = {HEADER: forged, "X-Tollgate-Identity": forged, "x-tollgate-anything": "x"}
    assert (await gateway.http.get("/v1/models", headers=shown)).status_code == 401
    assert (await gateway.http.get("/v1/models", headers={**shown, **key.headers})).status_code == 200
    assert backend.last.identity.key_id == str(key.key_id)
    assert [v for k, v in backend.last.headers if k.startswith("x-tollgate")] == [backend.last.header(HEADER)]
