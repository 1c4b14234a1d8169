"""One of several processes that draw on the same limit as fast as they can; prints how often it was admitted.

python -m tests.shared.limits_worker <hash tag> <attempts>
"""

import asyncio
import os
import sys

from shared.limits import Limits, RedisLimiter, Subject, create_link


async def main(tag: str, attempts: int) -> int:
    async with create_link(os.environ["TOLLGATE_REDIS_URL"], client_name="worker", timeout_ms=5_000) as link:
        limiter = RedisLimiter(link)
        subject = Subject(tag, "shared", Limits(minute=200, hour=1_000, day=10_000))
        decisions = await asyncio.gather(*(limiter.admit(subject) for _ in range(attempts)))
    return sum(d.admitted for d in decisions)


if __name__ == "__main__":
    print(asyncio.run(main(sys.argv[1], int(sys.argv[2]))))
