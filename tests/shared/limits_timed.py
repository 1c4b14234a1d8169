"""The limiter in Redis under a clock of the test's, and the comparison of its decisions with the oracle's."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from shared.limits import Decision, Limits, RedisLimiter, RedisLink, Script, Subject
from shared.limits.limiter import ADMIT
from shared.limits.resp import encoded
from tests.conftest import Components
from tests.shared.limits_oracle import EPOCH, SECOND, Oracle

SMALL_MINUTE, SMALL_HOUR, SMALL_DAY = 5, 17, 40
SMALL = Limits(SMALL_MINUTE, SMALL_HOUR, SMALL_DAY)
CLOCK_CALL = "redis.call('TIME')"


class TimedScript(Script):
    """admit.lua with a clock that the test sets: the call of the server's clock is replaced, nothing else."""

    def __init__(self, link: RedisLink) -> None:
        text = ADMIT.read_text()
        assert text.count(CLOCK_CALL) == 1
        super().__init__(link, text.replace(CLOCK_CALL, "{ ARGV[#ARGV - 1], ARGV[#ARGV] }"))
        self.now = EPOCH

    def packed(self, count: int, arguments: bytes, *, with_text: bool = False) -> bytes:
        time = encoded(self.now // SECOND, self.now % SECOND)
        return super().packed(count + 2, arguments + time, with_text=with_text)


class TimedLimiter:
    """The limiter in Redis under a clock of the test's."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.script = TimedScript(link)
        self.limiter = RedisLimiter(link, refusals_s=0, admit=self.script)  # its clock is not ours

    async def admit(self, subject: Subject, time_us: int, weight: int = 1) -> Decision:
        self.script.now = time_us
        return await self.limiter.admit(subject, weight=weight)

    async def state(self, subject: Subject) -> list[Any]:
        """Everything that Redis holds for the subject, and until when."""
        names = (subject.state_name, subject.leases_name)
        return [await self.link.call(verb, name) for verb in ("DUMP", "PEXPIRETIME") for name in names]


def subject(limits: Limits = SMALL) -> Subject:
    return Subject(tag=uuid4().hex, limit_id="it", limits=limits)


def check(decision: Decision, oracle: Oracle, limits: Limits, weight: int, time_us: int) -> None:
    """Compare one decision with the oracle, before and after."""
    fits = oracle.fits(limits, weight, time_us)
    assert decision.admitted == all(fits)
    if decision.admitted:
        oracle.record(time_us, weight)
    present = [(u, f) for u, f, q in zip(oracle.used(time_us), fits, limits.quotas, strict=True) if q is not None]
    for window, (used, fit) in zip(decision.windows, present, strict=True):
        assert window.remaining == max(window.quota - used, 0)
        assert window.reset_s > 0
        assert (window.wait_s > 0) == (not fit)


@pytest_asyncio.fixture
async def link(components: Components) -> AsyncIterator[RedisLink]:
    patient = {"timeout_ms": 60_000, "connect_timeout_ms": 60_000}  # a busy test machine is not an outage
    async with RedisLink(components.redis_url, client_name="test-limits", **patient) as link:
        assert link.up
        yield link


@pytest.fixture
def timed(link: RedisLink) -> TimedLimiter:
    return TimedLimiter(link)
