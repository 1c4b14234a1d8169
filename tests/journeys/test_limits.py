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
from tests.journeys.people import TIMEOUT_S, NewUser, User
from tests.running_stack import RunningStack

PER_MINUTE = 60
WINDOW_S = 60.0
EARLY_S = 0.5  # clocks of two processes
ATTEMPTS_MAX = 4


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
    text = httpx.get(f"{stack.env['TOLLGATE_GATEWAY_HTTP_URL']}/metrics", timeout=TIMEOUT_S).text
    found = re.search(r"^tollgate_gateway_limiter_duration_seconds_count (\S+)", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


@pytest.mark.timeout(300)
def test_the_61st_request_of_a_minute_is_refused_with_a_truthful_retry_after(
    stack: RunningStack, fresh_user: NewUser
) -> None:
    for _ in range(ATTEMPTS_MAX):
        user, before = fresh_user(), decided_in_valkey(stack)
        sent = time.monotonic()
        statuses = [user.api.get("/v1/models").status_code]
        answered = time.monotonic()
        statuses += [user.api.get("/v1/models").status_code for _ in range(PER_MINUTE)]
        if decided_in_valkey(stack) - before == PER_MINUTE + 1:
            break
    assert statuses == [200] * PER_MINUTE + [429]
    asked = time.monotonic()
    with pytest.raises(openai.RateLimitError) as refused:
        user.openai().models.list()
    told = time.monotonic()
    headers = refused.value.response.headers
    wait_s = int(headers["retry-after"])
    # Until the first request is a minute old, rounded up: it was counted between `sent` and `answered`.
    assert sent + WINDOW_S - told <= wait_s <= answered + WINDOW_S - asked + 1
    assert refused.value.code == "rate_limit_exceeded"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
    for _ in range(20):  # a refusal records nothing
        assert user.api.get("/v1/models").status_code == 429
    time.sleep(max(0.0, asked + wait_s - EARLY_S - time.monotonic()))
    until(lambda: user.api.get("/v1/models").status_code == 200, what="a minute has passed")
    assert time.monotonic() - sent >= WINDOW_S - EARLY_S


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
        assert known.ask(max_tokens=1).status_code == 200
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
            assert user.ask(max_tokens=1).status_code == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: probe.ask(max_tokens=1).status_code in (200, 429), what="requests are served again")


def test_an_emptied_valkey_lets_no_revoked_key_in_and_no_good_one_out(stack: RunningStack, fresh_user: NewUser) -> None:
    revoked, good = fresh_user(), fresh_user()
    for user in (revoked, good):
        assert user.ask(max_tokens=1).status_code == 200
    assert revoked.session.delete(f"/api/v1/keys/{revoked.key_id}").status_code == 204
    with redis.Redis.from_url(stack.env["TOLLGATE_REDIS_URL"]) as valkey:
        valkey.flushall()
    assert revoked.ask(max_tokens=1).status_code == 401
    assert good.ask(max_tokens=1).status_code == 200
