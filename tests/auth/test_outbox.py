"""Changed keys reach Redis: at once where it answers, and by the task where it did not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis

from services.auth import tasks
from services.auth.clients import ChangeChannel
from services.auth.domain import KeyEvent
from services.auth.errors import RedisDown
from services.auth.service.outbox import KEEP_MARGIN_S
from shared import access_tokens, apikeys
from shared.apikeys import Peppers
from tests.auth.harness import PEPPERS, Auth, Cable, User, running
from tests.conftest import Components
from tests.gateway.outages import Valkey

DEADLINE_S = 60


def names(user: User, key: dict[str, Any]) -> tuple[str, str, str]:
    """Digest, record's name, version's name."""
    digest = Peppers(PEPPERS).digest(key["key"]).hex
    return digest, apikeys.record_name(digest), apikeys.version_name(user.org_id, key["id"])


async def cache_as_a_gateway_does(auth: Auth, user: User, key: dict[str, Any]) -> tuple[str, str, str]:
    digest, record, version = names(user, key)
    await auth.redis.set(record, '{"v": 1}', ex=300)
    await auth.redis.set(version, "1", ex=300)
    return digest, record, version


@asynccontextmanager
async def listening(redis_url: str) -> AsyncIterator[Any]:
    async with Redis.from_url(redis_url, decode_responses=True) as redis, redis.pubsub() as channel:
        await channel.subscribe(apikeys.CHANNEL)
        await channel.get_message(timeout=DEADLINE_S)  # the confirmation
        yield channel


async def heard(channel: Any, digest: str) -> bool:
    async with asyncio.timeout(DEADLINE_S):
        async for message in channel.listen():
            if message["data"] == digest:
                return True
    return False


async def pending(auth: Auth, key: dict[str, Any]) -> int:
    async with auth.connect("tollgate_auth") as connection:
        return int(
            await connection.fetchval(
                "SELECT count(*) FROM auth.key_outbox WHERE key_id = $1 AND delivered_at IS NULL", key["id"]
            )
        )


@pytest.mark.parametrize("how", ["revoke", "delete", "patch", "rotate", "operator", "disabled"])
async def test_when_a_change_is_answered_redis_has_it_already(auth: Auth, components: Components, how: str) -> None:
    user, operator = await auth.user(), await auth.user("operator")
    key = await auth.key(user)
    digest, record, version = await cache_as_a_gateway_does(auth, user, key)
    path = f"/api/v1/keys/{key['id']}"
    method, path, token, body = {
        "revoke": ("POST", f"{path}/revoke", user.access_token, None),
        "delete": ("DELETE", path, user.access_token, None),
        "patch": ("PATCH", path, user.access_token, {"name": "x"}),
        "rotate": ("POST", f"{path}/rotate", user.access_token, None),
        "operator": ("POST", f"/api/v1/admin/auth/keys/{key['id']}/revoke", operator.access_token, None),
        "disabled": (
            "POST",
            f"/api/v1/admin/auth/users/{user.id}/status",
            operator.access_token,
            {"status": "disabled"},
        ),
    }[how]
    async with listening(components.redis_url) as channel:
        answer = await auth.call(method, path, token=token, json=body)
        assert answer.status_code < 300, answer.text
        assert await auth.redis.get(version) == "2"
        assert 0 < await auth.redis.ttl(version) <= apikeys.CACHE_TTL_S
        assert await auth.redis.get(record) is None
        assert await pending(auth, key) == 0
        assert await heard(channel, digest)


async def test_what_redis_missed_is_delivered_when_it_is_back(owner_url: str, components: Components) -> None:
    cable = Cable(components.redis_url)
    await cable.mend()
    async with running(owner_url, cable.url, auth_redis_timeout_ms=500) as auth:
        auth.redis = Redis.from_url(components.redis_url, decode_responses=True)
        user = await auth.user()
        key = await auth.key(user)
        _, record, version = await cache_as_a_gateway_does(auth, user, key)
        await cable.cut()
        answer = await auth.call("DELETE", f"/api/v1/keys/{key['id']}", token=user.access_token)
        assert answer.status_code == 204
        row = await auth.key_row(key["key"])
        assert row is not None
        assert row["status"] == "revoked"
        assert await pending(auth, key) == 1
        with pytest.raises(RedisDown):
            await auth.services.outbox.deliver_pending()

        task = asyncio.create_task(tasks.deliver_outbox(auth.services.outbox, 20))
        await cable.mend()
        async with asyncio.timeout(DEADLINE_S):
            while await pending(auth, key):
                await asyncio.sleep(0.02)
        assert await auth.redis.get(version) == "2"
        assert await auth.redis.get(record) is None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await auth.redis.aclose()
    await cable.cut()


async def test_a_late_delivery_never_lowers_the_version(auth: Auth) -> None:
    channel = ChangeChannel(Redis.from_url(auth.settings.redis_url.get_secret_value()))
    org_id, key_id = UUID(int=1), UUID(int=2)
    name = apikeys.version_name(str(org_id), str(key_id))
    for version, expected in ((5, "5"), (3, "5"), (10, "10"), (9, "10"), (10, "10")):
        await channel.announce([KeyEvent(1, key_id, org_id, "d" * 64, version)])
        assert await auth.redis.get(name) == expected
    await auth.redis.delete(name)
    await channel._redis.aclose()


@pytest.mark.parametrize("what", ["key", "session"])
async def test_a_revocation_that_a_failover_of_redis_lost_is_said_again(
    owner_url: str, tmp_path: Path, what: str
) -> None:
    """The server that takes over still has the version from before."""
    server = Valkey(tmp_path)
    server.start()
    try:
        async with running(owner_url, server.url, auth_redis_timeout_ms=5_000) as auth:
            user = await auth.user()
            key = await auth.key(user)
            session_id = (await auth.identity_of_token(user.access_token)).session_id
            names = {
                "key": apikeys.version_name(user.org_id, key["id"]),
                "session": access_tokens.version_name(user.org_id, session_id),
            }
            acts = {"key": ("DELETE", f"/api/v1/keys/{key['id']}"), "session": ("POST", "/api/v1/auth/logout")}
            await auth.services.outbox.deliver_pending()
            auth.clock.advance(auth.settings.auth_outbox_repeat_s + 1)
            assert (await auth.call(*acts[what], token=user.access_token)).status_code == 204
            assert await auth.redis.get(names[what]) == "2"

            server.kill()
            server.start()
            await auth.redis.connection_pool.disconnect()
            await auth.redis.set(names[what], "1", ex=300)
            with contextlib.suppress(RedisDown):  # by the connection to the old server
                await auth.services.outbox.deliver_pending()
            for _ in range(2):  # again and again for a while: a connection may still have spoken to the old server
                await auth.services.outbox.deliver_pending()
                assert await auth.redis.get(names[what]) == "2"
                await auth.redis.set(names[what], "1", ex=300)
            auth.clock.advance(auth.settings.auth_outbox_repeat_s + 1)
            await auth.services.outbox.deliver_pending()
            assert await auth.redis.get(names[what]) == "1"
    finally:
        server.kill()


async def test_what_redis_knows_is_not_said_again(auth: Auth, components: Components) -> None:
    """A gateway that knows a key would ask PostgreSQL for it at each request, for as long as all is said again."""
    user = await auth.user()
    key = await auth.key(user)
    answer = await auth.call("PATCH", f"/api/v1/keys/{key['id']}", token=user.access_token, json={"name": "x"})
    assert answer.status_code == 200
    other = await auth.key(user)
    digest, record, version = names(user, key)
    assert await auth.redis.get(version) == "2"
    await auth.redis.set(record, '{"v": 1}', ex=300)
    auth.services.outbox._server = ""  # as of a process that has just begun
    async with listening(components.redis_url) as channel:
        await auth.services.outbox.deliver_pending()
        await auth.call("DELETE", f"/api/v1/keys/{other['id']}", token=user.access_token)
        async with asyncio.timeout(DEADLINE_S):
            async for message in channel.listen():
                assert message["data"] != digest
                if message["data"] == names(user, other)[0]:
                    break
    assert await auth.redis.get(record) == '{"v": 1}'


async def test_what_was_delivered_goes_when_no_cache_can_have_it(auth: Auth) -> None:
    user = await auth.user()
    key = await auth.key(user)
    await auth.call("DELETE", f"/api/v1/keys/{key['id']}", token=user.access_token)

    async def kept() -> int:
        async with auth.connect() as connection:
            return int(await connection.fetchval("SELECT count(*) FROM auth.key_outbox WHERE key_id = $1", key["id"]))

    await auth.services.outbox.prune()
    assert await kept() == 1
    auth.clock.advance(apikeys.CACHE_TTL_S + KEEP_MARGIN_S + 1)
    await auth.services.outbox.prune()
    assert await kept() == 0


async def test_a_change_and_its_event_are_one_transaction(auth: Auth) -> None:
    """A change that is refused leaves no event behind."""
    user = await auth.user()
    key = await auth.key(user)
    refused = await auth.call(
        "PATCH", f"/api/v1/keys/{key['id']}", token=user.access_token, json={"limits": {"minute": 1000}}
    )
    assert refused.status_code == 403
    assert await pending(auth, key) == 0
    row = await auth.key_row(key["key"])
    assert row is not None
    assert row["version"] == 1
