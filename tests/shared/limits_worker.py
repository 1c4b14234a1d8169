"""One of several processes that draw on the same limit as fast as they can; prints how often it was admitted.

python -m tests.shared.limits_worker <hash tag> <attempts> [seconds by which its clock is wrong]
"""

import asyncio
import os
import sys
import time

from shared.limits import Limits, RedisLimiter, Subject, create_link


async def main(tag: str, attempts: int) -> int:
    async with create_link(os.environ["TOLLGATE_REDIS_URL"], client_name="worker", timeout_ms=60_000) as link:
        while not link.up:  # a busy machine: its first attempt was too late
            await asyncio.sleep(0.01)
        limiter = RedisLimiter(link)
        subject = Subject(tag, "shared", Limits(minute=200, hour=1_000, day=10_000))
        decisions = await asyncio.gather(*(limiter.admit(subject) for _ in range(attempts)))
    return sum(d.admitted for d in decisions)


def set_clock(wrong_by_s: float) -> None:
    """Have this process believe in another time of day, and another time since its machine began."""
    day, monotonic = time.time, time.monotonic
    time.time = lambda: day() + wrong_by_s
    time.monotonic = lambda: monotonic() + wrong_by_s


if __name__ == "__main__":
    set_clock(float(sys.argv[3]) if len(sys.argv) > 3 else 0)
    print(asyncio.run(main(sys.argv[1], int(sys.argv[2]))))
