"""Tokens per minute: no interval of a minute holds more than the quota, what was not used is free again, and a refusal
says truly when to come back. The script against a brute-force list; then races, lost callers, and Redis away.
"""

import asyncio
import random
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from shared.clock import FixedClock, SystemClock
from shared.limits import RedisLink, Script, TokenLimiter, TokenSubject, token_headers
from shared.limits.resp import Argument
from shared.limits.tokens import RESERVE, SETTLE
from tests.conftest import Components
from tests.gateway.outages import eventually
from tests.shared.limits_oracle import EPOCH, HOUR, MINUTE, SECOND, arrivals

CLOCK_CALL = "redis.call('TIME')"


def subject(quota: int) -> TokenSubject:
    return TokenSubject(uuid4().hex, "it", quota)


class TimedReserve(Script):
    """reserve_tokens.lua under a clock of the test's."""

    def __init__(self, link: RedisLink) -> None:
        text = RESERVE.read_text()
        assert text.count(CLOCK_CALL) == 1
        super().__init__(link, text.replace(CLOCK_CALL, "{ ARGV[3], ARGV[4] }"))
        self.now = EPOCH

    async def __call__(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> Any:
        return await super().__call__(names, (*arguments, self.now // SECOND, self.now % SECOND))


class Timed:
    """The limiter, its clock, and everything that it granted: [time, tokens]."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.script = TimedReserve(link)
        self.limiter = TokenLimiter(link, SystemClock())
        self.limiter._reserve = self.script
        self.granted: list[list[int]] = []

    def held(self, at: int) -> int:
        return sum(tokens for time, tokens in self.granted if at - MINUTE < time)

    async def state(self, it: TokenSubject) -> tuple[Any, Any]:
        return await self.link.call("DUMP", it.state_name), await self.link.call("PEXPIRETIME", it.state_name)


@pytest.mark.parametrize("seed", range(8))
async def test_every_reservation_is_the_lists(link: RedisLink, seed: int) -> None:
    timed, rng, it = Timed(link), random.Random(seed), subject(1_000)
    open_: list[tuple[Any, list[int]]] = []
    refusals = last = 0
    # A server that does not know the script is told it first; then what is settled would change the state later.
    await link.call("SCRIPT", "LOAD", SETTLE.read_text())
    for arrived in arrivals(seed, 400):
        timed.script.now = arrived - rng.choice((0, 0, 0, 5 * SECOND))
        now = last = max(last, timed.script.now) if timed.granted else timed.script.now
        amount = rng.choice((1, 10, 100, 400, 1_000, 0))
        before = await timed.state(it)
        decision = await timed.limiter.reserve(it, amount)
        held = timed.held(now)
        assert decision.admitted == (held + amount <= 1_000)
        if decision.admitted and amount:
            entry = [now, amount]
            timed.granted.append(entry)
            open_.append((decision.reservation, entry))
        else:
            last = max([time for time, _ in timed.granted], default=0)
            assert await timed.state(it) == before
        assert decision.remaining == 1_000 - timed.held(now)
        if not decision.admitted:
            refusals += 1
            fits_at = timed.script.now + round(decision.wait_s * SECOND)
            assert timed.held(fits_at) + amount <= 1_000 < timed.held(fits_at - 1) + amount
        if open_ and rng.random() < 0.5:
            reservation, entry = open_.pop(rng.randrange(len(open_)))
            entry[1] = rng.randint(0, entry[1])
            timed.limiter.settle(reservation, entry[1])
            timed.limiter.settle(reservation, 0)
    assert refusals > 20


async def test_thousands_of_small_reservations_move_into_longer_rings(link: RedisLink) -> None:
    timed, it = Timed(link), subject(5_000)
    reservations = []
    for i in range(5_000):
        timed.script.now = EPOCH + i * 1_000
        decision = await timed.limiter.reserve(it, 1)
        assert decision.admitted
        reservations.append(decision.reservation)
    assert not (await timed.limiter.reserve(it, 1)).admitted
    for reservation in reservations[::10]:
        timed.limiter.settle(reservation, 0)

    async def all_back() -> bool:
        return (await timed.limiter.reserve(it, 0)).remaining == 500

    await eventually(all_back)  # a server that does not know the script is told it first
    timed.script.now = EPOCH + HOUR
    assert (await timed.limiter.reserve(it, 1)).remaining == 4_999
    assert await link.call("STRLEN", it.state_name) < 200  # begun anew


async def test_more_than_the_quota_never_fits_and_a_quota_of_zero_is_no_limit(link: RedisLink) -> None:
    limiter, it = TokenLimiter(link, SystemClock()), subject(100)
    refused = await limiter.reserve(it, 101)
    assert (refused.admitted, refused.never_fits, refused.retry_after_s) == (False, True, 60)
    free = await limiter.reserve(subject(0), 10**9)
    assert (free.admitted, free.reservation, token_headers(free)) == (True, None, {})
    limiter.settle(free.reservation, 5)


async def test_what_was_not_used_is_free_at_once_and_headers_say_so(link: RedisLink) -> None:
    limiter, it = TokenLimiter(link, SystemClock()), subject(1_000)
    await link.call("SCRIPT", "FLUSH")
    first = await limiter.reserve(it, 900)
    assert token_headers(first)["x-ratelimit-remaining-tokens"] == "100"
    assert not (await limiter.reserve(it, 200)).admitted
    limiter.settle(first.reservation, 300)  # also to a server that does not know the script
    await eventually(lambda: _fits(limiter, it, 200))
    assert (await limiter.reserve(it, 0)).remaining == 500


async def _fits(limiter: TokenLimiter, it: TokenSubject, amount: int) -> bool:
    return (await limiter.reserve(it, amount)).admitted


async def test_many_at_once_never_pass_the_quota(components: Components, link: RedisLink) -> None:
    it = subject(1_000)
    async with RedisLink(components.redis_url, client_name="test-tokens-2", timeout_ms=60_000) as other:
        limiters = [TokenLimiter(each, SystemClock()) for each in (link, other)]
        decisions = await asyncio.gather(*(limiters[i % 2].reserve(it, 7) for i in range(400)))
    assert sum(d.admitted for d in decisions) == 1_000 // 7


async def test_a_caller_that_leaves_while_it_waits_reserves_nothing(link: RedisLink) -> None:
    limiter, it = TokenLimiter(link, SystemClock()), subject(1_000)
    calls = [asyncio.create_task(limiter.reserve(it, 100)) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)

    async def all_back() -> bool:
        return (await limiter.reserve(it, 0)).remaining == 1_000

    await eventually(all_back)


async def test_a_reservation_of_a_state_that_was_lost_takes_nothing_from_another(link: RedisLink) -> None:
    limiter, it = TokenLimiter(link, SystemClock()), subject(1_000)
    lost = await limiter.reserve(it, 400)
    await link.call("DEL", it.state_name)
    assert (await limiter.reserve(it, 300)).admitted
    limiter.settle(lost.reservation, 0)
    assert (await limiter.reserve(it, 0)).remaining == 700


@pytest.mark.parametrize("seed", range(3))
async def test_a_damaged_state_never_stops_redis(link: RedisLink, seed: int) -> None:
    rng, limiter = random.Random(seed), TokenLimiter(link, SystemClock())
    for _ in range(100):
        it = subject(1_000)
        decisions = [await limiter.reserve(it, 10) for _ in range(3)]
        await link.call("SETRANGE", it.state_name, rng.randrange(60), rng.randbytes(rng.randrange(1, 30)))
        await limiter.reserve(it, 10)
        limiter.settle(decisions[0].reservation, 1)
    assert await link.call("PING") == b"PONG"


async def test_without_redis_each_process_has_its_share() -> None:
    clock = FixedClock(datetime(2026, 1, 1, tzinfo=UTC))
    link = RedisLink("redis://127.0.0.1:1/0", client_name="nowhere")
    limiter, it = TokenLimiter(link, clock, processes=2, subjects_max=2), subject(1_000)
    first = await limiter.reserve(it, 400)
    assert (first.admitted, first.remaining) == (True, 100)
    clock.advance(20)
    refused = await limiter.reserve(it, 300)
    assert (refused.admitted, refused.retry_after_s) == (False, 40)
    limiter.settle(first.reservation, 100)
    assert (await limiter.reserve(it, 300)).remaining == 100
    assert (await limiter.reserve(subject(10), 5)).admitted
    full = await limiter.reserve(subject(10), 5)  # the table is full of subjects that still count
    assert (full.admitted, full.retry_after_s) == (False, 1)
    clock.advance(60)
    assert (await limiter.reserve(subject(10), 5)).admitted
    assert (await limiter.reserve(it, 501)).never_fits
