"""The link to Redis answers in order or fails at once; it never hangs, never repeats, never mixes up replies."""

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest

from shared.limits import CommandRefused, RedisLink, RedisUnavailable
from tests.conftest import Components
from tests.gateway.outages import Valkey, eventually, own_valkey


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with own_valkey() as server:
        yield server


def link_to(url: str, **options: int) -> RedisLink:
    return RedisLink(url, client_name="test-link", **options)


async def test_it_signs_in_with_the_urls_password_and_name(components: Components) -> None:
    async with link_to(components.redis_url) as link:
        assert await link.call("CLIENT", "GETNAME") == b"tollgate-test-link"


async def test_replies_stay_with_their_callers_when_others_leave(components: Components) -> None:
    async with link_to(components.redis_url, timeout_ms=5_000) as link:

        async def echo(i: int) -> bytes:
            reply: bytes = await link.call("ECHO", str(i))
            return reply

        tasks = [asyncio.create_task(echo(i)) for i in range(500)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, result in enumerate(results):
            assert isinstance(result, asyncio.CancelledError) if i % 3 == 0 else result == str(i).encode()


async def test_an_error_reply_belongs_to_its_command_only(components: Components) -> None:
    async with link_to(components.redis_url) as link:
        good, bad, after = link.call("PING"), link.call("NO-SUCH-COMMAND"), link.call("PING")
        assert await good == b"PONG"
        with pytest.raises(CommandRefused, match="unknown command"):
            await bad
        assert await after == b"PONG"


async def test_a_frozen_server_costs_one_timeout_and_then_nothing(valkey: Valkey) -> None:
    async with link_to(valkey.url, timeout_ms=100) as link:
        valkey.signal(signal.SIGSTOP)
        began = time.monotonic()
        calls = [link.call("INCR", "counter") for _ in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(r, RedisUnavailable) for r in results)
        assert time.monotonic() - began < 1
        with pytest.raises(RedisUnavailable, match="down"):
            link.call("PING")
        valkey.signal(signal.SIGCONT)
        await eventually(lambda: link.up)
        # What was written before the freeze ran once, when the server woke up; nothing was repeated.
        assert int(await link.call("GET", "counter") or 0) in (0, 20)


async def test_it_comes_back_after_a_kill(valkey: Valkey) -> None:
    async with link_to(valkey.url) as link:
        assert await link.call("PING") == b"PONG"
        valkey.kill()
        await eventually(lambda: not link.up)
        valkey.start()
        await eventually(lambda: link.up)
        assert await link.call("PING") == b"PONG"


async def test_a_server_that_is_not_there_at_the_start_is_tried_again(valkey: Valkey) -> None:
    valkey.kill()
    async with link_to(valkey.url) as link:
        assert not link.up
        valkey.start()
        await eventually(lambda: link.up)


async def test_a_wrong_password_keeps_the_link_down(components: Components) -> None:
    secret = components.redis_url.split("@")[0].rpartition(":")[2]
    async with link_to(components.redis_url.replace(secret, "wrong")) as link:
        assert not link.up


async def test_waiting_commands_are_bounded(components: Components) -> None:
    async with link_to(components.redis_url, pending_max=10) as link:
        calls = [link.call("PING") for _ in range(10)]
        with pytest.raises(RedisUnavailable, match="too many"):
            link.call("PING")
        assert await asyncio.gather(*calls) == [b"PONG"] * 10


async def test_a_busy_loop_of_our_own_is_not_taken_for_a_slow_server(components: Components) -> None:
    async with link_to(components.redis_url, timeout_ms=50) as link:
        call = link.call("PING")
        await asyncio.sleep(0)
        time.sleep(0.2)
        assert await call == b"PONG"
        assert link.up
