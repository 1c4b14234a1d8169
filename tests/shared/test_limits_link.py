"""The link to Redis answers in order or fails at once; it never hangs, never repeats, never mixes up replies."""

import asyncio
import select
import signal
import time
from collections.abc import Iterator

import pytest

from shared.limits import CommandRefused, Limits, RedisLimiter, RedisLink, RedisUnavailable, Subject
from tests.conftest import Components
from tests.gateway.outages import TcpSwitch, Valkey, eventually, own_valkey


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with own_valkey() as server:
        yield server


def link_to(url: str, **options: int) -> RedisLink:
    """Patient, where a test says nothing else: a busy machine is not an outage."""
    patient = {"timeout_ms": 60_000, "connect_timeout_ms": 60_000}
    return RedisLink(url, client_name="test-link", **{**patient, **options})


async def test_it_signs_in_with_the_urls_password_and_name(components: Components) -> None:
    async with link_to(components.redis_url) as link:
        assert await link.call("CLIENT", "GETNAME") == b"tollgate-test-link"


async def test_replies_stay_with_their_callers_when_others_leave(components: Components) -> None:
    async with link_to(components.redis_url) as link:

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
        await eventually(lambda: link.up)
        valkey.signal(signal.SIGSTOP)
        calls = [link.call("INCR", "counter") for _ in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(r, RedisUnavailable) for r in results)
        with pytest.raises(RedisUnavailable, match="down"):
            link.call("PING")
        valkey.signal(signal.SIGCONT)
    async with link_to(valkey.url) as patient:
        # What was written before the freeze ran once, when the server woke up; nothing was repeated.
        assert int(await patient.call("GET", "counter") or 0) in (0, 20)


async def test_an_admission_whose_reply_is_lost_counts_once(valkey: Valkey) -> None:
    """The script has run, and nobody knows: it is not sent again, so that at most one place is lost."""
    switch, it = TcpSwitch(valkey.url), Subject("org", "it", Limits(minute=5))
    await switch.open()
    async with link_to(valkey.url) as direct, link_to(switch.url, timeout_ms=1_000) as link:
        there = RedisLimiter(direct)
        assert (await there.admit(it)).admitted  # the server knows the script
        await eventually(lambda: link.up)
        switch.hold_replies()
        with pytest.raises(RedisUnavailable):
            await RedisLimiter(link).admit(it)

        async def has_run() -> bool:
            return (await there.admit(it, weight=0)).windows[0].remaining == 3

        await eventually(has_run)
        switch.release_replies()
        await eventually(lambda: link.up)
        assert (await RedisLimiter(link).admit(it, weight=0)).windows[0].remaining == 3
    await switch.cut()


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
    async with link_to(components.redis_url, timeout_ms=200) as link:
        await eventually(lambda: link.up)
        assert link._connection is not None
        assert link._connection._transport is not None
        socket = link._connection._transport.get_extra_info("socket")
        call = link.call("PING")
        await asyncio.sleep(0)
        began = time.monotonic()
        select.select([socket], [], [], 60)  # the loop does nothing until the reply is there, and then is late
        time.sleep(max(0.0, began + 0.3 - time.monotonic()))
        assert await call == b"PONG"
        assert link.up
