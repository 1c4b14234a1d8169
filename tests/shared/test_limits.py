"""No interval of a minute, an hour or a day ever admits more than its quota; a refusal changes nothing and says truly
when to come back. The limiter in Redis and the local one against a brute-force oracle.
"""

import asyncio
import contextlib
import math
import random
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from shared.clock import FixedClock
from shared.limits import (
    CommandRefused,
    Limits,
    LocalLimiter,
    RedisLimiter,
    RedisLink,
    Subject,
    Verdict,
)
from tests.conftest import ROOT, Components
from tests.shared.limits_oracle import (
    CELL,
    DAY,
    EPOCH,
    HOUR,
    MILLISECOND,
    MINUTE,
    SECOND,
    Oracle,
    arrivals,
    most_in_any_interval,
    worst_case_arrivals,
)
from tests.shared.limits_timed import SMALL, SMALL_DAY, SMALL_HOUR, SMALL_MINUTE, TimedLimiter, check, subject


@pytest.mark.parametrize("seed", range(12))
async def test_every_decision_is_the_oracles(timed: TimedLimiter, seed: int) -> None:
    rng, it, oracle = random.Random(seed), subject(), Oracle()
    for time_us in arrivals(seed, 400):
        weight = rng.choice((1, 1, 1, 1, 2, 3, 0, 6))
        decision = await timed.admit(it, time_us, weight)
        if weight <= SMALL_MINUTE:
            check(decision, oracle, SMALL, weight, time_us)
        else:
            assert not decision.admitted
    assert most_in_any_interval(oracle.admitted, MINUTE) <= SMALL_MINUTE
    assert most_in_any_interval(oracle.admitted, HOUR) <= SMALL_HOUR
    assert most_in_any_interval(oracle.admitted, DAY) <= SMALL_DAY


@pytest.mark.parametrize(
    "limits", [Limits(5, 17, None), Limits(5, None, None), Limits(None, 17, 40), Limits(None, None, 9)]
)
async def test_windows_that_are_not_there_do_not_limit(timed: TimedLimiter, limits: Limits) -> None:
    rng, it, oracle = random.Random(7), subject(limits), Oracle()
    for time_us in arrivals(7, 300):
        weight = rng.choice((1, 1, 2, 0))
        check(await timed.admit(it, time_us, weight), oracle, limits, weight, time_us)


async def test_a_day_that_is_added_counts_what_the_hour_knows(timed: TimedLimiter) -> None:
    it = subject(Limits(10, 10, None))
    for i in range(4):
        assert (await timed.admit(it, EPOCH + i)).admitted
    with_day = Subject(it.tag, it.limit_id, Limits(10, 10, 6))
    decisions = [await timed.admit(with_day, EPOCH + MINUTE + i) for i in range(4)]
    assert [d.admitted for d in decisions] == [True, True, False, False]
    assert [w.remaining for w in (await timed.admit(it, EPOCH + MINUTE + 9)).windows] == [7, 3]


async def test_an_address_that_came_once_leaves_little(link: RedisLink) -> None:
    it = Subject("2001:db8:1:2::/64", f"anonymous-{uuid4().hex[:4]}", Limits(60, 1_000, None))
    assert (await RedisLimiter(link).admit(it)).admitted
    assert await link.call("STRLEN", it.state_name) == 55
    assert await link.call("MEMORY", "USAGE", it.state_name) < 250
    assert await link.call("PTTL", it.state_name) <= 3_900_000


@pytest.mark.parametrize("seed", range(6))
async def test_limits_that_change_take_effect_at_once_and_forget_nothing(timed: TimedLimiter, seed: int) -> None:
    rng, it, oracle = random.Random(seed), subject(), Oracle()
    limits = SMALL
    for time_us in arrivals(seed + 100, 400):
        if rng.random() < 0.1:
            limits = Limits(minute=rng.choice((1, 5, 9)), hour=rng.choice((3, 17, 60)), day=rng.choice((10, 40, 90)))
        decision = await timed.admit(Subject(it.tag, it.limit_id, limits), time_us)
        check(decision, oracle, limits, 1, time_us)


@pytest.mark.parametrize("seed", range(4))
async def test_a_clock_that_goes_back_and_forward_opens_nothing(timed: TimedLimiter, seed: int) -> None:
    rng, it, oracle = random.Random(seed), subject(), Oracle()
    for time_us in arrivals(seed + 200, 300):
        shifted = time_us + rng.choice((0, 0, 0, -SECOND, -5 * MINUTE, 5 * MINUTE))
        decision = await timed.admit(it, shifted)
        check(decision, oracle, SMALL, 1, shifted)


@pytest.mark.parametrize("seed", range(3))
async def test_a_refusal_leaves_no_trace(timed: TimedLimiter, seed: int) -> None:
    it = subject(Limits(minute=3, hour=7, day=12, concurrency=2))
    for time_us in arrivals(seed + 300, 150):
        before = await timed.state(it)
        decision = await timed.admit(it, time_us)
        if decision.admitted:
            assert decision.lease is not None
            timed.limiter.release(decision.lease)
        else:
            assert await timed.state(it) == before


@pytest.mark.parametrize("seed", range(4))
async def test_a_wait_is_sufficient_and_minimal(timed: TimedLimiter, seed: int) -> None:
    it, oracle = subject(), Oracle()
    refusals = 0
    for time_us in arrivals(seed + 400, 300):
        decision = await timed.admit(it, time_us)
        if decision.admitted:
            oracle.record(time_us, 1)
            continue
        refusals += 1
        for i, window in enumerate(decision.windows):
            if window.wait_s > 0:
                wait_us = round(window.wait_s * SECOND)
                assert oracle.fits(SMALL, 1, time_us + wait_us)[i], window
                assert not oracle.fits(SMALL, 1, time_us + wait_us - 1)[i], window
        assert decision.retry_after_s >= max(w.wait_s for w in decision.windows)
        assert all(oracle.fits(SMALL, 1, time_us + decision.retry_after_s * SECOND))
    assert refusals > 20


async def test_the_exact_edges_of_a_window(timed: TimedLimiter) -> None:
    it = subject(Limits(minute=2, hour=100, day=1_000))
    t = EPOCH + 7 * SECOND
    for offset, admitted in (
        (0, True),
        (MILLISECOND, True),
        (MINUTE - MILLISECOND, False),
        (MINUTE - 1, False),
        (MINUTE, True),
        (MINUTE + MILLISECOND - 1, False),
        (MINUTE + MILLISECOND, True),
    ):
        assert (await timed.admit(it, t + offset)).admitted == admitted, offset


async def test_the_exact_edges_of_a_days_cell(timed: TimedLimiter) -> None:
    it = subject(Limits(minute=100, hour=100, day=1))
    assert (await timed.admit(it, EPOCH + CELL - 1)).admitted
    assert not (await timed.admit(it, EPOCH + DAY + CELL - MILLISECOND)).admitted
    assert not (await timed.admit(it, EPOCH + DAY + CELL - 1)).admitted
    assert (await timed.admit(it, EPOCH + DAY + CELL)).admitted


async def test_a_full_ring_of_the_default_size_stays_exact(timed: TimedLimiter) -> None:
    limits = Limits()
    it, oracle = subject(limits), Oracle()
    times = [EPOCH + i * 3 * SECOND for i in range(2_600)]
    for time_us in times:
        decision = await timed.admit(it, time_us)
        # 20 a minute: the hour's thousand is what stops it
        expected = sum(1 for t in oracle.admitted[-1_000:] if t > time_us - HOUR) < 1_000
        assert decision.admitted == expected
        if expected:
            oracle.record(time_us, 1)
    assert most_in_any_interval(oracle.admitted, HOUR) == 1_000
    assert await timed.link.call("STRLEN", it.state_name) < 8_400


async def assert_never_over(admit: Callable[[int], Any], quota: int, length: int) -> None:
    """The property itself, under the arrivals that break counters."""
    admitted = [time_us for time_us in worst_case_arrivals(quota, length) if await admit(time_us)]
    most = most_in_any_interval(admitted, length)
    assert most <= quota, f"{most} in one interval, {quota} allowed"
    assert most == quota


async def test_the_limiter_survives_the_worst_case(timed: TimedLimiter) -> None:
    it = subject(Limits(minute=60, hour=100_000, day=100_000))

    async def admit(time_us: int) -> bool:
        return (await timed.admit(it, time_us)).admitted

    await assert_never_over(admit, 60, MINUTE)


async def test_a_two_cell_counter_does_not(timed: TimedLimiter) -> None:
    """The counter-example to the common scheme: the previous cell weighted by its overlap, plus the present one."""
    cells: dict[int, int] = {}

    async def admit(time_us: int) -> bool:
        cell, into = divmod(time_us, MINUTE)
        weighted = int(cells.get(cell - 1, 0) * (1 - into / MINUTE))
        if weighted + cells.get(cell, 0) + 1 > 60:
            return False
        cells[cell] = cells.get(cell, 0) + 1
        return True

    with pytest.raises(AssertionError, match=r"1\d\d in one interval, 60 allowed"):
        await assert_never_over(admit, 60, MINUTE)


@pytest.mark.parametrize("seed", range(3))
async def test_a_damaged_state_never_stops_redis(timed: TimedLimiter, seed: int) -> None:
    """The answer may be anything, an error too; but it comes."""
    rng = random.Random(seed)
    for _ in range(150):
        it = subject()
        for i in range(4):
            await timed.admit(it, EPOCH + i * rng.choice((1, SECOND, CELL, HOUR)))
        await timed.link.call("SETRANGE", it.state_name, rng.randrange(1_200), rng.randbytes(rng.randrange(1, 30)))
        with contextlib.suppress(CommandRefused, ValueError):
            await timed.admit(it, EPOCH + rng.choice((5 * HOUR, DAY, 300 * DAY)))
    assert await timed.link.call("PING") == b"PONG"


async def test_weight_zero_looks_and_records_nothing(timed: TimedLimiter) -> None:
    it = subject(Limits(minute=1, hour=1, day=1, concurrency=1))
    assert (await timed.admit(it, EPOCH, 0)).admitted
    assert await timed.link.call("EXISTS", it.state_name, it.leases_name) == 0
    assert (await timed.admit(it, EPOCH)).admitted
    look = await timed.admit(it, EPOCH, 0)
    assert look.admitted
    assert [w.remaining for w in look.windows] == [0, 0, 0]


async def test_a_quota_of_zero_admits_nothing(timed: TimedLimiter) -> None:
    decision = await timed.admit(subject(Limits(minute=0, hour=10, day=10)), EPOCH)
    assert not decision.admitted
    assert decision.retry_after_s == 60


async def test_the_version_must_match_positively(link: RedisLink) -> None:
    it = subject()
    named = Subject(it.tag, it.limit_id, it.limits, version_name=f"{{{it.tag}}}:keyver:k", version="3")
    limiter = RedisLimiter(link)
    assert (await limiter.admit(named)).verdict is Verdict.STALE
    for held, verdict in (("2", Verdict.STALE), ("4", Verdict.STALE), ("3", Verdict.ADMITTED)):
        await link.call("SET", named.version_name, held)
        assert (await limiter.admit(named)).verdict is verdict
    assert (await limiter.admit(named)).windows[0].remaining == SMALL_MINUTE - 2


async def test_leases_bound_concurrency_and_expire(timed: TimedLimiter) -> None:
    it = subject(Limits(minute=100, hour=100, day=100, concurrency=2))
    first = await timed.admit(it, EPOCH)
    second = await timed.admit(it, EPOCH)
    third = await timed.admit(it, EPOCH)
    assert first.lease
    assert second.lease
    assert (third.admitted, third.crowded, third.violated) == (False, "", None)
    assert third.windows[0].remaining == 98
    timed.limiter.release(first.lease)
    timed.limiter.release(first.lease)
    assert (await timed.admit(it, EPOCH)).admitted
    assert not (await timed.admit(it, EPOCH + 60 * SECOND - 1)).admitted
    assert (await timed.admit(it, EPOCH + 60 * SECOND)).admitted


async def test_scripts_are_sent_again_to_a_server_that_forgot_them(link: RedisLink) -> None:
    limiter, it = RedisLimiter(link), subject()
    assert (await limiter.admit(it)).admitted
    await link.call("SCRIPT", "FLUSH")
    assert (await limiter.admit(it)).windows[0].remaining == SMALL_MINUTE - 2


@pytest.mark.parametrize(("processes", "each"), [(4, 150), pytest.param(8, 200, marks=pytest.mark.torture)])
async def test_processes_whose_clocks_are_wrong_admit_exactly_the_quota(
    components: Components, processes: int, each: int
) -> None:
    tag = uuid4().hex
    workers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.shared.limits_worker", tag, str(each), str((-300, 0, 300)[i % 3])),
            cwd=ROOT,
            env={"TOLLGATE_REDIS_URL": components.redis_url, "PYTHONPATH": ""},
            stdout=asyncio.subprocess.PIPE,
        )
        for i in range(processes)
    ]
    outputs = await asyncio.gather(*(worker.communicate() for worker in workers))
    assert sum(int(out) for out, _ in outputs) == 200


@pytest.mark.parametrize("seed", range(8))
def test_the_local_limiter_is_the_oracles_too(seed: int) -> None:
    clock = FixedClock(datetime(2026, 1, 1, tzinfo=UTC))
    offset = -(int(clock.monotonic_s()) * SECOND)
    local, it, oracle = LocalLimiter(clock), subject(), Oracle()
    for time_us in arrivals(seed, 400, start=CELL * 4):
        step = (time_us + offset) // SECOND * SECOND  # whole seconds, which floats hold exactly
        offset -= step
        clock.advance(step // SECOND)
        now = round(clock.monotonic_s()) * SECOND
        decision = local.admit(it)
        check(decision, oracle, SMALL, 1, now)
        if not decision.admitted:
            wait_us = math.ceil(max(w.wait_s for w in decision.windows)) * SECOND
            assert all(oracle.fits(SMALL, 1, now + wait_us))


def test_local_shares_together_stay_within_the_limit() -> None:
    clock = FixedClock(datetime(2026, 1, 1, tzinfo=UTC))
    limits = Limits(minute=10, hour=100, day=1_000)
    gateways = [LocalLimiter(clock) for _ in range(3)]
    it = subject(limits)
    admitted = sum(g.admit(it, parts=3).admitted for g in gateways for _ in range(20))
    assert admitted == 9


def test_local_concurrency_is_given_back_once() -> None:
    local = LocalLimiter(FixedClock(datetime(2026, 1, 1, tzinfo=UTC)))
    it = subject(Limits(concurrency=1))
    lease = local.admit(it).lease
    assert lease
    assert local.admit(it).crowded == ""
    local.release(lease)
    local.release(lease)
    assert local.admit(it).admitted
