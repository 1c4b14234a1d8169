"""The headers of an admission, made straight from the script's answer, are those of its decision."""

import random

from shared.limits import Decision, Limits, Subject, Verdict, admitted_headers, rate_limit_headers
from shared.limits.limiter import _windows


def limits(chance: random.Random) -> Limits:
    quotas = [chance.choice((None, 1, 60, 10_000)) for _ in range(3)]
    return Limits(quotas[0], quotas[1], quotas[2], concurrency=chance.choice((0, 5)))


def test_they_are_the_same() -> None:
    chance = random.Random(6)
    for _ in range(3_000):
        ceilings = tuple(
            Subject("o", owner, limits(chance), owner=owner)
            for owner in ("user", "organization")
            if chance.random() < 0.3
        )
        subject = Subject("o", "key", limits(chance), ceilings=ceilings)
        answer = [1]
        for _ in subject.drawn:
            answer.append(chance.randrange(5))
            for _ in range(3):
                reset_us = chance.choice((1, 999_999, 1_000_000, 59_999_999, chance.randrange(1, 86_400_000_000)))
                answer += (chance.choice((0, 1, chance.randrange(10_000))), reset_us, 0)
        decision = Decision(Verdict.ADMITTED, _windows(subject, answer), policy=subject.policy)
        wanted = "".join([f"{name}: {value}\r\n" for name, value in rate_limit_headers(decision).items()])
        assert admitted_headers(subject, answer) == wanted.encode()
