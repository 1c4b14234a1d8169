"""Which replica answers: the least busy of those that work, as the table says now."""

import asyncio
import contextlib
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from deploy.local.ports import pick_port
from services.gateway.access_log import AccessLog
from services.gateway.discovery import Discovery
from services.gateway.exchange import Exchange
from services.gateway.replicas import FAILURES_MAX, PROBES_MISSED_MAX, PoolSettings, Replica, Upstream
from shared.clock import Clock, FixedClock, SystemClock
from shared.errors import Unavailable
from shared.telemetry import GatewayMetrics
from tests.conftest import Components
from tests.gateway import harness
from tests.gateway.harness import Directory, gateway, settings
from tests.gateway.outages import DEADLINE_S, eventually

CHAT = "/v1/chat/completions"


def upstream(urls: list[str], clock: Clock | None = None, **changes: Any) -> Upstream:
    clock = clock or FixedClock(datetime(2026, 11, 21, tzinfo=UTC))
    pools = PoolSettings(**{"connect_timeout_s": 60, **changes})
    return Upstream("chat", urls, clock, pools, GatewayMetrics(CollectorRegistry()))


@contextlib.asynccontextmanager
async def listener(port: int | None = None) -> AsyncIterator[str]:
    """Accepts connections and says nothing."""
    held: list[asyncio.StreamWriter] = []

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    port = port or pick_port()
    server = await asyncio.start_server(hold, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()
        for writer in held:
            writer.close()


async def test_the_replica_with_the_fewest_outstanding_is_next() -> None:
    async with listener() as one, listener() as two, listener() as three:
        service = upstream([one, two, three])
        chosen = Counter([(await service.connect())[0].url for _ in range(9)])
        assert chosen == {one: 3, two: 3, three: 3}
        service.close()


async def test_one_that_refuses_is_passed_over_and_asked_again_later() -> None:
    clock = FixedClock(datetime(2026, 11, 21, tzinfo=UTC))
    nowhere = f"http://127.0.0.1:{pick_port()}"
    async with listener() as one:
        service = upstream([nowhere, one], clock)
        assert {(await service.connect())[0].url for _ in range(4)} == {one}
        gone = service.replicas[0]
        assert not gone.may_serve(clock.monotonic_s())
        clock.advance(1.1)
        assert gone.may_serve(clock.monotonic_s())
        service.update([nowhere])
        clock.advance(1.1)
        for _ in range(2):  # tried again each time: to be refused costs nothing
            with pytest.raises(Unavailable) as refused:
                await service.connect()
            assert refused.value.retry_after_s == 1


async def test_the_only_one_that_refused_serves_as_soon_as_it_is_back() -> None:
    clock = FixedClock(datetime(2026, 11, 21, tzinfo=UTC))
    port = pick_port()
    service = upstream([f"http://127.0.0.1:{port}"], clock)
    with pytest.raises(Unavailable):
        await service.connect()
    async with listener(port):
        [replica] = service.replicas
        assert not replica.may_serve(clock.monotonic_s())
        assert (await service.connect())[0] is replica
        service.close()


def test_failures_in_a_row_put_a_replica_out_for_longer_and_longer() -> None:
    replica = Replica("http://x:1", SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(FAILURES_MAX - 1):
        replica.failed(0.0)
    replica.succeeded()
    for _ in range(FAILURES_MAX - 1):
        replica.failed(0.0)
    assert replica.may_serve(0.0)
    now_s = 0.0
    for out_s in (1, 2, 4, 8, 16, 30, 30):
        replica.failed(now_s)
        assert not replica.may_serve(now_s + out_s - 0.01)
        now_s += out_s
        assert replica.may_serve(now_s)
        replica.chosen()
        assert not replica.may_serve(now_s)  # one request at a time tries it
    replica.probed(answers=True)  # its process was never the problem
    assert not replica.may_serve(now_s)
    replica.succeeded()
    assert replica.may_serve(now_s)


async def test_one_that_does_not_answer_probes_is_the_last_choice() -> None:
    async with listener() as frozen, listener() as well:
        service = upstream([frozen, well], probe_timeout_s=0.05)
        for _ in range(PROBES_MISSED_MAX):
            service.replicas[0].probed(answers=False)
        assert {(await service.connect())[0].url for _ in range(4)} == {well}
        await service.probe()
        with pytest.raises(Unavailable):
            service.reachable()
        service.close()


async def test_connections_have_a_limit_and_who_waits_gets_the_next_that_is_free() -> None:
    async with listener() as one:
        service = upstream([one], connections_max=2)
        _, first = await service.connect()
        await service.connect()
        waiting = asyncio.create_task(service.connect())
        await asyncio.sleep(0)
        assert service.replicas[0].pool.outstanding == 2
        first.abandon()
        await asyncio.wait_for(waiting, DEADLINE_S)
        assert service.replicas[0].pool.outstanding == 2
        service.close()


async def test_who_waits_no_longer_is_forgotten() -> None:
    async with listener() as one:
        service = upstream([one], SystemClock(), connections_max=1)
        await service.connect()
        service._settings = PoolSettings(connect_timeout_s=0.01)
        for _ in range(3):
            with pytest.raises(Unavailable, match="busy"):
                await service.connect()
        assert not service._waiting
        service.close()


@pytest.mark.parametrize("is_woken", [False, True])
async def test_one_that_leaves_while_it_waits_takes_nobodys_turn(is_woken: bool) -> None:
    async with listener() as one:
        service = upstream([one], connections_max=1)
        _, only = await service.connect()
        leaving, staying = asyncio.create_task(service.connect()), asyncio.create_task(service.connect())
        await asyncio.sleep(0)
        if is_woken:  # it is told, and leaves before it can act on it
            service._wake()
        leaving.cancel()
        only.abandon()
        await asyncio.wait_for(staying, DEADLINE_S)
        assert leaving.cancelled()
        service.close()


async def test_the_table_follows_its_file_and_survives_a_broken_one(tmp_path: Path) -> None:
    file = tmp_path / "services.json"
    service = upstream(["http://a:1"])
    discovery = Discovery({"chat": service}, {"chat": "http://a:1"}, file)

    async def look(text: str | None) -> list[str]:
        file.unlink(missing_ok=True) if text is None else file.write_text(text)
        await discovery.look()
        return [replica.url for replica in service.replicas]

    assert await look(None) == ["http://a:1"]
    kept = service.replicas[0]
    assert await look(json.dumps({"chat": ["http://a:1", "http://b:2/"]})) == ["http://a:1", "http://b:2"]
    assert service.replicas[0] is kept
    for broken in (
        "{",
        "[]",
        '{"chat": []}',
        '{"chat": [1]}',
        '{"other": ["http://c:1"]}',
        '{"chat": ["ftp://c"]}',
        None,
    ):
        assert await look(broken) == ["http://a:1", "http://b:2"]
    assert await look("{}") == ["http://a:1"]  # what the file does not name is the environment's


async def test_a_name_stands_for_its_addresses() -> None:
    service = upstream(["http://localhost:1"])
    await Discovery({"chat": service}, {"chat": "dns+http://localhost:81"}, None).look()
    assert "http://127.0.0.1:81" in [replica.url for replica in service.replicas]
    await Discovery({"chat": service}, {"chat": "dns+http://no-such-name.invalid:81"}, None).look()
    assert "http://127.0.0.1:81" in [replica.url for replica in service.replicas]


async def test_replicas_come_and_go_under_load_without_a_lost_request(
    components: Components, database_url: str, directory: Directory, tmp_path: Path
) -> None:
    key = await directory.create_key(limits={"minute": 100_000, "hour": 100_000, "day": 100_000})
    file = tmp_path / "services.json"
    statuses: Counter[int] = Counter()
    async with harness.backend() as one, harness.backend() as two:
        configured = settings(
            components.redis_url, database_url, one.url, gateway_services_file=file, gateway_services_interval_s=0.05
        )
        file.write_text(json.dumps({"chat": [one.url]}))
        async with gateway(configured) as running:
            done = asyncio.Event()

            async def ask() -> None:
                async with httpx.AsyncClient(base_url=running.url, timeout=DEADLINE_S, trust_env=False) as client:
                    while not done.is_set():
                        statuses[(await client.post(CHAT, headers=key.headers, json={})).status_code] += 1

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            for there in ([one, two], [two], [one]):
                for app in (one, two):
                    app.seen.clear()
                file.write_text(json.dumps({"chat": [app.url for app in there]}))
                await eventually(lambda there=there: all(len(app.seen) > 5 for app in there))  # type: ignore[misc]
            done.set()
            await asyncio.gather(*asking)
    assert set(statuses) == {200}


def test_the_log_keeps_a_share_of_what_went_well_and_everything_else() -> None:
    out = io.StringIO()
    log = AccessLog("gateway", sample=0.25, lines_max=1, out=out)
    for status, complete in [(200, True)] * 100 + [(429, True)] * 3 + [(502, True), (200, False)]:
        exchange = Exchange()
        exchange.request_id, exchange.status, exchange.complete, exchange.route = "r", status, complete, "/v1/models"
        log.write(exchange, datetime(2025, 11, 21, 4, 40, tzinfo=UTC), 0.0123)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert Counter((line["status_code"], line["complete"]) for line in lines) == {
        (200, True): 25,
        (429, True): 3,
        (502, True): 1,
        (200, False): 1,
    }
    assert lines[0].keys() >= {"timestamp", "level", "service", "endpoint", "response_time_ms", "status_code"}
    assert lines[0]["timestamp"].startswith("2025-11-21T04:40:00")
