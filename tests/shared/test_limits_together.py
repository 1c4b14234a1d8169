"""Several limits at once: ceilings over keys, requests at once, and what is remembered of a refusal."""

import asyncio
import random
import re
import time
from collections import Counter, defaultdict
from uuid import uuid4

import pytest

from shared.limits import Limits, Question, RedisLimiter, RedisLink, Subject
from tests.shared.limits_oracle import SECOND, Oracle, arrivals
from tests.shared.limits_timed import TimedLimiter, subject


@pytest.mark.parametrize("seed", range(6))
async def test_a_request_draws_on_every_ceiling_or_on_none(timed: TimedLimiter, seed: int) -> None:
    """Two keys of each of two users in one organisation, each level compared with an oracle of its own."""
    rng, tag = random.Random(seed), uuid4().hex
    limits = {"key": Limits(3, 20, 60), "user": Limits(5, None, 70), "organization": Limits(7, 30, None, 0)}
    oracles: dict[str, Oracle] = defaultdict(Oracle)
    refused_by: Counter[str] = Counter()
    for time_us in arrivals(seed + 500, 500):
        user, key, weight = rng.randrange(2), rng.randrange(2), rng.choice((1, 1, 1, 2, 0))
        levels = (("key", f"key-{user}-{key}"), ("user", f"user-{user}"), ("organization", "all"))
        ceilings = tuple(Subject(tag, name, limits[owner], owner=owner) for owner, name in levels[1:])
        it = Subject(tag, levels[0][1], limits["key"], ceilings=ceilings)
        fits = {owner: oracles[name].fits(limits[owner], weight, time_us) for owner, name in levels}
        before = [await timed.state(drawn) for drawn in it.drawn]
        decision = await timed.admit(it, time_us, weight)
        assert decision.admitted == all(all(fit) for fit in fits.values())
        if decision.admitted:
            for _, name in levels:
                oracles[name].record(time_us, weight)
        else:
            assert [await timed.state(drawn) for drawn in it.drawn] == before
            assert decision.violated
            refused_by[decision.violated.owner] += 1
            after = [time_us + decision.retry_after_s * SECOND] * 3
            assert all(all(oracles[n].fits(limits[o], weight, t)) for (o, n), t in zip(levels, after, strict=True))
        for window in decision.windows:
            owner = window.owner or "key"
            at = ("minute", "hour", "day").index(window.name.rpartition("-")[2])
            used = oracles[dict(levels)[owner]].used(time_us)[at]
            assert window.remaining == max(window.quota - used, 0), window
    assert set(refused_by) == {"", "user", "organization"}


async def test_ceilings_count_requests_at_once_and_are_given_back_together(link: RedisLink) -> None:
    tag, limiter = uuid4().hex, RedisLimiter(link)
    ceilings = (
        Subject(tag, "u", Limits(None, None, None, 3), owner="user"),
        Subject(tag, "all", Limits(None, None, None, 5), owner="organization"),
    )
    keys = [Subject(tag, f"k{i}", Limits(concurrency=2), ceilings=ceilings) for i in range(3)]
    held = [await limiter.admit(key) for key in (keys[0], keys[0], keys[1])]
    assert [d.admitted for d in held] == [True] * 3
    assert (await limiter.admit(keys[0])).crowded == ""
    assert (await limiter.admit(keys[2])).crowded == "user"
    assert held[0].lease
    limiter.release(held[0].lease)
    assert (await limiter.admit(keys[2])).admitted
    assert await link.call("ZCARD", ceilings[1].leases_name) == 3


async def test_a_refusal_is_remembered_exactly_as_long_as_it_is_certain(link: RedisLink) -> None:
    """Redis is not asked meanwhile; nothing that it would have admitted is refused; nobody else is concerned."""
    limiter, tag = RedisLimiter(link, refusals_s=60), uuid4().hex
    it = Subject(tag, "it", Limits(minute=1, hour=1_000, day=1_000, concurrency=50))
    assert (await limiter.admit(it)).admitted
    name, ring = it.state_name, 48 + 289 * 4
    stamp = int.from_bytes(await link.call("GETRANGE", name, ring, ring + 6), "big")
    await link.call("SETRANGE", name, ring, (stamp - 56_000_000).to_bytes(7, "big"))  # 4 s are left
    forgetful = RedisLimiter(link, refusals_s=0)
    first = await limiter.admit(it)
    asked, looks = await _scripts_run(link), 0
    began = time.monotonic()
    while True:
        free = (await forgetful.admit(it, weight=0)).windows[0].remaining
        looks += 1
        decision = await limiter.admit(it)
        if decision.admitted:
            break
        assert free == 0
        assert 1 <= decision.retry_after_s <= 4
        assert 0 < decision.windows[0].wait_s <= first.windows[0].wait_s
        assert time.monotonic() - began < 60
        await asyncio.sleep(0.001)
    assert looks > 2
    assert await _scripts_run(link) - asked - looks <= 2
    assert decision.windows[0].remaining == 0
    assert not (await limiter.admit(it)).admitted
    assert (await limiter.admit(Subject(tag, "it", Limits(minute=3, hour=1_000, day=1_000)))).admitted
    assert (await limiter.admit(Subject(tag, "other", it.limits))).admitted
    assert (await limiter.admit(it, weight=0)).admitted


async def _scripts_run(link: RedisLink) -> int:
    stats: bytes = await link.call("INFO", "commandstats")
    found = re.search(rb"cmdstat_evalsha:calls=(\d+)", stats)
    return int(found[1]) if found else 0


async def test_too_many_at_once_is_not_remembered(link: RedisLink) -> None:
    limiter, it = RedisLimiter(link), subject(Limits(concurrency=1))
    for _ in range(5):
        held = await limiter.admit(it)
        assert held.lease
        assert not (await limiter.admit(it)).admitted
        limiter.release(held.lease)


async def test_leases_live_on_while_they_are_renewed(link: RedisLink) -> None:
    """When they end without that: test_leases_bound_concurrency_and_expire."""
    limiter = RedisLimiter(link, lease_ttl_s=600)
    it = subject(Limits(concurrency=1))
    held = await limiter.admit(it)
    assert held.lease
    ends_us = [float(await link.call("ZSCORE", it.leases_name, held.lease.id))]
    for _ in range(3):
        await asyncio.sleep(0.01)
        await limiter.renew_leases()
        ends_us.append(float(await link.call("ZSCORE", it.leases_name, held.lease.id)))
        assert ends_us[-1] > ends_us[-2]
        assert int(await link.call("PTTL", it.leases_name)) > 500_000
    assert not (await limiter.admit(it)).admitted
    limiter.release(held.lease)
    assert (await limiter.admit(it)).admitted


async def test_a_caller_that_leaves_while_it_waits_keeps_no_lease(link: RedisLink) -> None:
    limiter = RedisLimiter(link)
    it = subject(Limits(concurrency=5))
    await limiter.admit(it, weight=0)
    calls = [asyncio.create_task(limiter.admit(it)) for _ in range(5)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert await link.call("ZCARD", it.leases_name) == 0


async def test_a_question_that_is_left_keeps_no_lease_whether_or_not_its_answer_has_come(link: RedisLink) -> None:
    limiter = RedisLimiter(link)
    it = subject(Limits(concurrency=5))
    await limiter.admit(it, weight=0)
    heard: list[Question] = []
    unanswered, answered = limiter.ask(it, 1, heard.append), limiter.ask(it, 1, heard.append)
    limiter.leave(unanswered)
    await link.call("PING")
    assert heard == [answered]
    assert answered.is_admitted
    limiter.leave(answered)
    assert await link.call("ZCARD", it.leases_name) == 0
    lease = (await limiter.admit(it)).lease
    assert lease is not None
    limiter.release(lease)
    await limiter.renew_leases()
    assert await link.call("ZCARD", it.leases_name) == 0
