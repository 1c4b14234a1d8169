"""The use of keys, from the gateways' stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
import pytest_asyncio

from services.auth import tasks
from shared import apikeys
from tests.auth.harness import Auth, User

AT = datetime(2030, 5, 17, 12, 30, 45, 123456, tzinfo=UTC)


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def emptied(auth: Auth) -> AsyncIterator[None]:
    """Tests share the stream: nobody else should read what is made up here."""
    yield
    await auth.redis.delete(apikeys.USAGE_STREAM)


async def used(auth: Auth, key_id: str, at: datetime) -> None:
    """What a gateway adds."""
    event = {"v": 1, "at": at.isoformat(), "key_id": key_id, "status": 200}
    await auth.redis.xadd(apikeys.USAGE_STREAM, {"event": json.dumps(event)})


async def last_used_at(auth: Auth, user: User, key_id: str) -> str | None:
    answer = await auth.call("GET", f"/api/v1/keys/{key_id}", token=user.access_token)
    found: str | None = answer.json()["last_used_at"]
    return found


async def take_everything(auth: Auth) -> None:
    for _ in range(2):  # the first may only have made the group
        while await auth.services.key_usage.note_batch():
            pass


async def test_the_use_of_a_key_is_summed_by_day_and_old_days_go(auth: Auth) -> None:
    user, stranger = await auth.user(), await auth.user()
    key, unused = await auth.key(user), await auth.key(user)
    today = auth.clock.now()
    yesterday = today - timedelta(days=1)
    events: list[dict[str, object]] = [
        {"at": today, "status": 200, "bytes_in": 10, "bytes_out": 100},
        {"at": today, "status": 404, "bytes_in": 1, "bytes_out": 2},
        {"at": yesterday, "status": 503, "bytes_in": 5, "bytes_out": 0},
    ]
    for event in events:
        whole = {"v": 1, "key_id": key["id"], **event, "at": event["at"].isoformat()}  # type: ignore[attr-defined]
        await auth.redis.xadd(apikeys.USAGE_STREAM, {"event": json.dumps(whole)})
    # Of no key of ours; of a form that is not ours.
    for odd in ({"key_id": str(UUID(int=7)), "at": today.isoformat(), "status": 200}, {"key_id": key["id"]}):
        await auth.redis.xadd(apikeys.USAGE_STREAM, {"event": json.dumps(odd)})
    await take_everything(auth)

    async def uses(path: str, user: User = user) -> list[list[object]]:
        answer = await auth.call("GET", path, token=user.access_token)
        assert answer.status_code == 200, answer.text
        return [list(day.values()) for day in answer.json()["data"]]

    path = f"/api/v1/keys/{key['id']}/usage"
    first, second = today.date().isoformat(), yesterday.date().isoformat()
    assert await uses(path) == [[first, 2, 1, 0, 11, 102], [second, 1, 0, 1, 5, 0]]
    assert await uses(f"{path}?days=1") == [[first, 2, 1, 0, 11, 102]]
    assert await uses(f"/api/v1/keys/{unused['id']}/usage") == []
    assert (await auth.call("GET", path, token=stranger.access_token)).status_code == 404
    auth.clock.advance(auth.settings.auth_key_usage_days * 86_400)
    while await auth.services.key_usage.prune():
        pass
    async with auth.connect() as connection:
        assert await connection.fetchval("SELECT count(*) FROM auth.key_usage WHERE key_id = $1", key["id"]) == 1


async def test_the_last_use_is_shown_to_the_minute_and_never_goes_back(auth: Auth) -> None:
    user = await auth.user()
    first, second = await auth.key(user), await auth.key(user)
    assert await last_used_at(auth, user, first["id"]) is None
    await used(auth, first["id"], AT)
    await used(auth, second["id"], AT - timedelta(days=1))
    await used(auth, first["id"], AT - timedelta(hours=1))
    await take_everything(auth)
    assert await last_used_at(auth, user, first["id"]) == "2030-05-17T12:30:00Z"
    assert await last_used_at(auth, user, second["id"]) == "2030-05-16T12:30:00Z"
    await used(auth, first["id"], AT - timedelta(days=9))
    await take_everything(auth)
    assert await last_used_at(auth, user, first["id"]) == "2030-05-17T12:30:00Z"
    row = await auth.key_row(first["key"])
    assert row is not None
    assert row["version"] == 1  # gateways need not hear of it


@pytest.mark.parametrize("junk", ["", "[]", "null", '{"key_id": 7, "at": 7}', '{"key_id": "x", "at": "y"}', '{"v": 1}'])
async def test_events_of_another_form_are_passed_over(auth: Auth, junk: str) -> None:
    user = await auth.user()
    key = await auth.key(user)
    await auth.redis.xadd(apikeys.USAGE_STREAM, {"event": junk})
    await auth.redis.xadd(apikeys.USAGE_STREAM, {"other": junk})
    await used(auth, "", AT)
    await used(auth, key["id"], AT)
    await take_everything(auth)
    assert await last_used_at(auth, user, key["id"]) is not None


async def test_the_task_goes_on_after_redis_was_emptied(auth: Auth) -> None:
    user = await auth.user()
    key = await auth.key(user)
    await take_everything(auth)
    await auth.redis.delete(apikeys.USAGE_STREAM)
    task = asyncio.create_task(tasks.note_key_usage(auth.services.key_usage, 10))
    await used(auth, key["id"], AT)
    async with asyncio.timeout(60):
        while await last_used_at(auth, user, key["id"]) is None:
            await asyncio.sleep(0.02)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
