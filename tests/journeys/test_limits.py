"""Limits: the 61st request of a minute, and what holds while Valkey is stopped, frozen or emptied."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
import redis

from tests.journeys.conftest import until
from tests.journeys.people import NewUser, User
from tests.running_stack import RunningStack

PER_MINUTE = 60
MARGIN_S = 1.5
ATTEMPTS_MAX = 4
ANSWER_WITHIN_S = 5.0


@contextmanager
def without_valkey(stack: RunningStack, user: User) -> Iterator[None]:
    """Valkey is stopped inside the block; after it, it serves again."""
    stack.stop("valkey")
    try:
        yield
    finally:
        stack.start("valkey")
        until(lambda: user.ask(max_tokens=1).status_code in (200, 429), what="requests are served again")


def decided_in_valkey(stack: RunningStack) -> int:
    """How many admissions Valkey has decided. Where it answers late, as on a busy machine, a share of the gateway's own
    takes over, which may admit one quota more.
    """
    text = httpx.get(f"{stack.env['TOLLGATE_GATEWAY_HTTP_URL']}/metrics", timeout=ANSWER_WITHIN_S).text
    found = re.search(r"^tollgate_gateway_limiter_duration_seconds_count (\S+)", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


@pytest.mark.timeout(300)
def test_the_61st_request_of_a_minute_is_refused_with_a_truthful_retry_after(
    stack: RunningStack, fresh_user: NewUser
) -> None:
    for _ in range(ATTEMPTS_MAX):
        user, before = fresh_user(), decided_in_valkey(stack)
        first = time.monotonic()
        statuses = [user.api.get("/v1/models").status_code for _ in range(PER_MINUTE + 1)]
        if decided_in_valkey(stack) - before == PER_MINUTE + 1:
            break
    assert statuses == [200] * PER_MINUTE + [429]
    with pytest.raises(openai.RateLimitError) as refused:
        user.openai().models.list()
    headers = refused.value.response.headers
    wait_s = int(headers["retry-after"])
    assert abs(time.monotonic() + wait_s - (first + 60)) <= MARGIN_S
    assert refused.value.code == "rate_limit_exceeded"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
    for _ in range(20):  # a refusal records nothing
        assert user.api.get("/v1/models").status_code == 429
    time.sleep(max(0.0, first + 60 - MARGIN_S - time.monotonic()))
    assert user.api.get("/v1/models").status_code == 429
    time.sleep(2 * MARGIN_S)
    assert user.api.get("/v1/models").status_code == 200


def test_two_keys_have_limits_of_their_own(fresh_user: NewUser) -> None:
    one, other = fresh_user(), fresh_user()
    while one.api.get("/v1/models").status_code == 200:
        pass
    assert other.api.get("/v1/models").status_code == 200


def test_with_valkey_stopped_keys_are_checked_in_postgresql_and_limits_hold(
    stack: RunningStack, fresh_user: NewUser
) -> None:
    known, probe = fresh_user(), fresh_user()
    assert known.ask(max_tokens=1).status_code == 200
    with without_valkey(stack, probe):
        began = time.monotonic()
        assert known.ask(max_tokens=1).status_code == 200
        assert time.monotonic() - began < ANSWER_WITHIN_S
        made_meanwhile = known.openai(api_key=known.new_key()["key"])
        assert made_meanwhile.models.list().data
        statuses = [known.api.get("/v1/models").status_code for _ in range(2 * PER_MINUTE)]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) < PER_MINUTE
        revoked = known.session.post(f"/api/v1/keys/{known.key_id}/revoke")
        assert revoked.status_code == 200
        assert known.api.get("/v1/models").status_code == 401
    assert known.api.get("/v1/models").status_code == 401


def test_a_frozen_valkey_does_not_freeze_requests(stack: RunningStack, fresh_user: NewUser) -> None:
    user, probe = fresh_user(), fresh_user()
    assert user.ask(max_tokens=1).status_code == 200
    pid = stack.pid("valkey")
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(5):
            began = time.monotonic()
            assert user.ask(max_tokens=1).status_code == 200
            assert time.monotonic() - began < ANSWER_WITHIN_S
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: probe.ask(max_tokens=1).status_code == 200, what="requests are served again")


def test_an_emptied_valkey_lets_no_revoked_key_in_and_no_good_one_out(stack: RunningStack, fresh_user: NewUser) -> None:
    revoked, good = fresh_user(), fresh_user()
    for user in (revoked, good):
        assert user.ask(max_tokens=1).status_code == 200
    assert revoked.session.delete(f"/api/v1/keys/{revoked.key_id}").status_code == 204
    with redis.Redis.from_url(stack.env["TOLLGATE_REDIS_URL"]) as valkey:
        valkey.flushall()
    assert revoked.ask(max_tokens=1).status_code == 401
    assert good.ask(max_tokens=1).status_code == 200
