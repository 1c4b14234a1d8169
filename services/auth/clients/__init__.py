"""Redis: where gateways look keys up, hear of changes, and leave word of what was used; and the mail server.

Per change, in this order: the version of the key or session goes up (never down, so that a late delivery does no
harm); of a key, the cached record goes, and every gateway hears the digest. From the first of the three on, no
admission finds the version that it wants, and asks PostgreSQL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import aiosmtplib
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from services.auth.domain import DailyUse, Event, KeyEvent
from services.auth.domain.mails import Mail
from services.auth.errors import MailNotSent, RedisDown
from shared import access_tokens, apikeys

SMTP_PORTS = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
REDIS_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
_RAISE_VERSION = """
local held = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
if tonumber(ARGV[1]) > held then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
    return 1
end
return 0
"""


class Mailer:
    """Hands messages to a mail server: `smtp://` (in the clear, or STARTTLS where it is offered), `smtp+starttls://`
    (STARTTLS or nothing), `smtps://` (TLS from the start); user and password in the URL.
    """

    def __init__(self, url: str, sender: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SMTP_PORTS or not parts.hostname:
            raise ValueError(f"wants {', '.join(f'{scheme}://host' for scheme in SMTP_PORTS)}")
        self._options: dict[str, Any] = {
            "hostname": parts.hostname,
            "port": parts.port or SMTP_PORTS[parts.scheme],
            "username": unquote(parts.username) if parts.username else None,
            "password": unquote(parts.password) if parts.password else None,
            "use_tls": parts.scheme == "smtps",
            "start_tls": {"smtps": False, "smtp+starttls": True}.get(parts.scheme),
            "timeout": timeout_s,
        }
        self._sender = sender

    async def send(self, mail: Mail) -> None:
        """Raises MailNotSent."""
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = self._sender, mail.address, mail.subject
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=self._sender.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(mail.text)
        message.add_alternative(mail.html, subtype="html")
        try:
            await aiosmtplib.send(message, **self._options)
        except aiosmtplib.SMTPRecipientsRefused as e:
            permanent = all(500 <= refusal.code < 600 for refusal in e.recipients)
            raise MailNotSent(detail=type(e).__name__, permanent=permanent) from e
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as e:
            raise MailNotSent(detail=type(e).__name__, permanent=False) from e


class ChangeChannel:
    """Tells gateways about changed keys and sessions."""

    def __init__(self, redis: Redis | RedisCluster) -> None:
        self._redis = redis

    async def announce(self, events: Sequence[Event]) -> None:
        """Deliver changes; saying one twice does no harm. Raises RedisDown when not all of them arrived."""
        await self._raise_versions(events)
        await self._make_forget(events)

    async def repeat(self, events: Sequence[Event]) -> None:
        """Deliver those of which Redis has an older version, or none; that of the others would only cost the gateways
        what they know. Raises RedisDown.
        """
        had_older = await self._raise_versions(events)
        await self._make_forget([event for event, older in zip(events, had_older, strict=True) if older])

    async def _raise_versions(self, events: Sequence[Event]) -> list[bool]:
        """Of each, whether Redis had an older version, or none."""
        pipeline = self._redis.pipeline(transaction=False)
        for event in events:
            pipeline.eval(_RAISE_VERSION, 1, _version_name(event), str(event.version), str(apikeys.CACHE_TTL_S))
        try:
            return [answer == 1 for answer in await pipeline.execute()]
        except REDIS_FAILURES as e:
            raise RedisDown(detail=type(e).__name__) from e

    async def _make_forget(self, events: Sequence[Event]) -> None:
        """Remove what is cached of keys, in Redis and in every gateway."""
        digests = [event.digest for event in events if isinstance(event, KeyEvent)]
        if not digests:
            return
        pipeline = self._redis.pipeline(transaction=False)
        is_cluster = isinstance(self._redis, RedisCluster)  # its pipelines do not publish
        for digest in digests:
            pipeline.delete(apikeys.record_name(digest))
            if not is_cluster:
                pipeline.publish(apikeys.CHANNEL, digest)
        try:
            await pipeline.execute()
            for digest in digests if is_cluster else ():
                await self._redis.publish(apikeys.CHANNEL, digest)
        except REDIS_FAILURES as e:
            raise RedisDown(detail=type(e).__name__) from e

    async def server(self) -> str:
        """Which server answers, or which primaries: others after a failover or a restart. Raises RedisDown."""
        try:
            if isinstance(self._redis, RedisCluster):
                nodes: dict[str, Any] = await self._redis.info("server", target_nodes=RedisCluster.PRIMARIES)
                return " ".join(sorted(str(node.get("run_id", "")) for node in nodes.values()))
            found: dict[str, Any] = await self._redis.info("server")
        except REDIS_FAILURES as e:
            raise RedisDown(detail=type(e).__name__) from e
        return str(found.get("run_id", ""))


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """What a batch of events says: how many they were, and per key its last use and its use by day (UTC)."""

    events: int
    last_uses: dict[UUID, datetime]
    daily_uses: dict[UUID, list[DailyUse]]


class UsageStream:
    """The gateways' stream of usage events, shared out among auth's replicas. A batch that is lost with its reader
    stays lost: nobody is billed by it.
    """

    GROUP = "auth"

    def __init__(self, redis: Redis | RedisCluster) -> None:
        self._redis = redis

    async def read(self, batch_max: int) -> UsageBatch:
        """The next events, at most `batch_max`. Raises RedisDown."""
        try:
            reply: Any = await self._redis.xreadgroup(
                self.GROUP, self.GROUP, {apikeys.USAGE_STREAM: ">"}, count=batch_max, noack=True
            )
        except ResponseError as e:
            if not str(e).startswith("NOGROUP"):
                raise RedisDown(detail=type(e).__name__) from e
            await self._join()
            return UsageBatch(0, {}, {})
        except REDIS_FAILURES as e:
            raise RedisDown(detail=type(e).__name__) from e
        return _batch([fields for _, batch in reply for _, fields in batch])

    async def _join(self) -> None:
        """Make stream and group, where they never were or Redis was emptied."""
        try:
            await self._redis.xgroup_create(apikeys.USAGE_STREAM, self.GROUP, id="0", mkstream=True)
        except ResponseError as e:
            if not str(e).startswith("BUSYGROUP"):  # another replica was quicker
                raise RedisDown(detail=type(e).__name__) from e
        except REDIS_FAILURES as e:
            raise RedisDown(detail=type(e).__name__) from e


def _version_name(event: Event) -> str:
    if isinstance(event, KeyEvent):
        return apikeys.version_name(str(event.org_id), str(event.key_id))
    return access_tokens.version_name(str(event.org_id), str(event.session_id))


def _batch(entries: list[dict[bytes, bytes]]) -> UsageBatch:
    last: dict[UUID, datetime] = {}
    sums: dict[tuple[UUID, date], list[int]] = {}
    for key_id, at, status, bytes_in, bytes_out in filter(None, map(_use, entries)):
        last[key_id] = max(at, last.get(key_id, at))
        total = sums.setdefault((key_id, at.astimezone(UTC).date()), [0, 0, 0, 0, 0])
        counted = (1, 400 <= status < 500, status >= 500, bytes_in, bytes_out)
        total[:] = map(sum, zip(total, counted, strict=True))
    daily: dict[UUID, list[DailyUse]] = {}
    for (key_id, day), total in sums.items():
        daily.setdefault(key_id, []).append(DailyUse(day, *total))
    return UsageBatch(len(entries), last, daily)


def _use(fields: dict[bytes, bytes]) -> tuple[UUID, datetime, int, int, int] | None:
    """Key, time, status and bytes of an event; None for one without a key, or of a form that is not ours."""
    try:
        event = json.loads(fields[b"event"])
        at = datetime.fromisoformat(event["at"])
        figures = (int(event["status"]), int(event.get("bytes_in", 0)), int(event.get("bytes_out", 0)))
        return (UUID(event["key_id"]), at, *figures) if at.tzinfo else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
