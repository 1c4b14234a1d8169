"""What strangers can cost us: keys that nobody was given, however many, take neither PostgreSQL nor memory."""

import asyncio
import contextlib
import itertools
import time
import tracemalloc
from collections import Counter

import httpx
import pytest
from prometheus_client import CollectorRegistry

from services.gateway.guesses import Guesses
from services.gateway.keys import KeyStore
from services.gateway.repository import KeyRepository
from shared import apikeys, http_protocol
from shared.clock import SystemClock
from shared.errors import RateLimited, Unauthenticated
from shared.limits import RedisLink
from shared.telemetry import GatewayMetrics
from tests.conftest import Components
from tests.gateway.harness import PEPPERS, Directory, Gateway

PER_MINUTE, ADDRESSES, REMEMBERED_MAX = 5, 200, 500
WARM_UP = 4_000
LOOKUPS = "tollgate_gateway_key_lookups_total"


@pytest.mark.parametrize("head", [b"", b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: "], ids=["silent", "slow"])
async def test_clients_that_never_finish_a_head_are_hung_up_on_and_bother_nobody(
    gateway: Gateway, directory: Directory, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    key, port = await directory.create_key(limits={"minute": 100_000}), int(gateway.url.rpartition(":")[2])
    statuses = Counter([(await gateway.http.get("/v1/models", headers=key.headers)).status_code])
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.5)
    slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
    for _, writer in slow:
        writer.write(head)
    ended = asyncio.gather(*(reader.read() for reader, _ in slow), return_exceptions=True)
    while not ended.done():
        with contextlib.suppress(httpx.TransportError):  # a connection of our own that was new, and late as well
            statuses[(await gateway.http.get("/v1/models", headers=key.headers)).status_code] += 1
        for _, writer in slow:
            if head and not writer.is_closing():
                writer.write(b"x")
        await asyncio.sleep(0.02)
    assert [got for got in await ended if isinstance(got, bytes) and got] == []  # not a word
    assert statuses.keys() == {200}
    for _, writer in slow:
        writer.close()


@pytest.mark.parametrize(
    "count", [4_000, pytest.param(1_000_000, marks=[pytest.mark.torture, pytest.mark.timeout(3_600)])]
)
async def test_keys_that_nobody_was_given_cost_bounded_reads_and_memory(
    components: Components, database_url: str, count: int
) -> None:
    """Half of them do not even have the right checksum; the others come from many addresses, again and again."""
    clock, registry = SystemClock(), CollectorRegistry()
    link = RedisLink(components.redis_url, client_name="attacks", timeout_ms=5_000)
    async with KeyRepository(database_url, timeout_ms=10_000) as repository:
        store = KeyStore(
            peppers=apikeys.Peppers(PEPPERS),
            repository=repository,
            link=link,
            clock=clock,
            metrics=GatewayMetrics(registry),
            guesses=Guesses(clock, per_minute=PER_MINUTE),
            process_entries_max=1_000,
            process_ttl_s=30,
            negative_entries_max=REMEMBERED_MAX,
            negative_ttl_s=3_600,
        )
        async with link:
            answers: Counter[type[Exception]] = Counter()
            numbers = itertools.count()

            async def attack(until: int) -> None:
                while (number := next(numbers)) < until:
                    key = apikeys.generate()
                    if number % 2:
                        key = key[:-1] + ("0" if key[-1] != "0" else "1")
                    try:
                        await store.find(key, f"192.0.2.{number // 2 % ADDRESSES}")
                    except (Unauthenticated, RateLimited) as e:
                        answers[type(e)] += 1

            began = time.monotonic()
            await asyncio.gather(*(attack(WARM_UP) for _ in range(20)))  # what there is once for all is there
            tracemalloc.start()
            numbers = itertools.count()
            await asyncio.gather(*(attack(count) for _ in range(20)))
            grown, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    read = registry.get_sample_value(LOOKUPS, {"source": "postgres"}) or 0
    junk = registry.get_sample_value(LOOKUPS, {"source": "junk"})
    minutes = (time.monotonic() - began) / 60
    print(f"{count} keys in {minutes:.1f} minutes: {read:.0f} reads, {grown // 1024} KB more, {dict(answers)}")
    assert junk == (WARM_UP + count) / 2
    assert 0 < read <= ADDRESSES * PER_MINUTE * (2 + minutes)
    assert answers.total() == WARM_UP + count
    assert answers[RateLimited] + read >= (WARM_UP + count) / 2
    assert grown < 5_000_000
