"""One corked connection to Redis: the commands of a loop tick leave in one write, the replies come back in order.

    down ──connect, AUTH, SELECT, PING answered──► up ──closed, or a reply late by more than `timeout_ms`──► down

The state is the circuit breaker: while down, `call` raises RedisUnavailable at once, and one background task tries
again with back-off. Published messages come over the same connection (RESP3), so that whoever is up hears them, in
order with its replies. A command is written once and never repeated, since a script whose reply was lost may have run.
A caller that gives up leaves its place in the queue of replies, so that a reply never reaches another caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, cast

import hiredis
from redis.asyncio.connection import parse_url

from shared.limits.resp import Argument, pack
from shared.telemetry import get_logger

log = get_logger(__name__)

RECONNECT_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
LATE_GRACE_S = 0.01
_NOTHING = object()

Hear = Callable[[bytes], None]


class RedisUnavailable(Exception):
    """Redis is down, slow, or in no state to serve."""


class CommandRefused(RedisUnavailable):
    """Redis answered with an error; the message is Redis's own."""

    @property
    def is_noscript(self) -> bool:
        return str(self).startswith("NOSCRIPT")


class Hearer(Protocol):
    """Who waits for a reply."""

    @property
    def is_gone(self) -> bool:
        """Whether nobody does any more."""

    def hear(self, reply: Any) -> None:
        """The reply (bytes, int, None, list), or the RedisUnavailable that there is instead of one."""


class Link(Protocol):
    """What the limiters need: RedisLink, or ClusterLink for a cluster."""

    @property
    def up(self) -> bool: ...

    @property
    def epoch(self) -> int:
        """Grows whenever a connection is made: what a server said in an earlier one, another may not know."""

    def call(self, *command: Argument) -> asyncio.Future[Any]: ...

    def send(self, *command: Argument) -> None: ...

    def ask(self, name: str, packed: bytes, hearer: Hearer | None) -> None:
        """Send a command that is packed already; `name` is its key, `hearer` hears the reply in the same turn of the
        loop in which it comes. Raises RedisUnavailable as `call`."""

    def subscribe(self, channel: str, hear: Hear, begin: Callable[[], None]) -> None: ...


class RedisLink:
    """See the module. An async context manager: entering waits for the first attempt, whatever comes of it."""

    def __init__(
        self,
        url: str,
        *,
        client_name: str,
        timeout_ms: int = 100,
        connect_timeout_ms: int = 500,
        pending_max: int = 10_000,
    ) -> None:
        self._target: dict[str, Any] = dict(parse_url(url))
        self._client_name = f"tollgate-{client_name}"
        self._timeout_s = timeout_ms / 1000
        self._connect_timeout_s = connect_timeout_ms / 1000
        self._pending_max = pending_max
        self._channels: dict[bytes, tuple[Hear, Callable[[], None]]] = {}
        self.epoch = 0
        self._connection: _Connection | None = None
        self._runner: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether commands are accepted now."""
        return self._connection is not None and not self._connection.is_lost

    def call(self, *command: Argument) -> asyncio.Future[Any]:
        """Send a command. The future ends with the reply (bytes, int, None, list), CommandRefused or RedisUnavailable.

        Raises RedisUnavailable at once while the link is down or has `pending_max` replies outstanding.
        """
        waiting = Waiting()
        self.ask("", pack(*command), waiting)
        return waiting.future

    def send(self, *command: Argument) -> None:
        """Send a command and ignore what comes of it."""
        with contextlib.suppress(RedisUnavailable):
            self.ask("", pack(*command), None)

    def ask(self, name: str, packed: bytes, hearer: Hearer | None) -> None:
        """As Link's."""
        connection = self._connection
        if connection is None or connection.is_lost:
            raise RedisUnavailable("the link to Redis is down")
        connection.ask(packed, hearer)

    def subscribe(self, channel: str, hear: Hear, begin: Callable[[], None]) -> None:
        """Have `hear` called with every message of a channel, and `begin` whenever the link comes up: what was
        published before was missed. Call it before the link is entered.
        """
        assert self._runner is None
        self._channels[channel.encode()] = (hear, begin)

    async def __aenter__(self) -> Self:
        await self._try_connect(quiet=True)
        self._runner = asyncio.create_task(self._run(), name="redis-link")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        self._runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._runner
        if self._connection is not None:
            self._connection.close("the link was closed")

    async def _run(self) -> None:
        failures = 0
        while True:
            if self._connection is not None:
                await asyncio.wait([self._connection.lost])
                log.warning("redis_link_down", reason=self._connection.lost.result())
                self._connection = None
            if await self._try_connect(quiet=failures > 0):
                failures = 0
                log.info("redis_link_up")
            else:
                await asyncio.sleep(RECONNECT_BACKOFF_S[min(failures, len(RECONNECT_BACKOFF_S) - 1)])
                failures += 1

    async def _try_connect(self, *, quiet: bool) -> bool:
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._open()
                await self._greet(connection)
        except (OSError, TimeoutError, RedisUnavailable) as e:
            if not quiet:
                log.warning("redis_connect_failed", detail=f"{type(e).__name__}: {e}")
            return False
        else:
            for _, begin in self._channels.values():
                begin()
            self._connection = connection
            self.epoch += 1
            return True
        finally:
            if connection is not None and connection is not self._connection:
                connection.close("the greeting failed")

    async def _greet(self, connection: _Connection) -> None:
        """Sign in and subscribe; the last reply proves the rest."""
        password, user, db = (self._target.get(k) for k in ("password", "username", "db"))
        replies = []
        if password:
            replies.append(connection.call(("AUTH", user, password) if user else ("AUTH", password)))
        replies.append(connection.call(("HELLO", 3)))
        if db:
            replies.append(connection.call(("SELECT", int(db))))
        replies.append(connection.call(("CLIENT", "SETNAME", self._client_name)))
        if self._channels:
            connection.write(pack("SUBSCRIBE", *self._channels))
        replies.append(connection.call(("PING",)))
        await asyncio.gather(*replies)

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()

        def make() -> _Connection:
            return _Connection(loop, self._timeout_s, self._pending_max, self._heard)

        if "path" in self._target:
            _, connection = await loop.create_unix_connection(make, self._target["path"])
            return connection
        context = ssl.create_default_context() if "connection_class" in self._target else None
        host, port = self._target.get("host", "127.0.0.1"), self._target.get("port", 6379)
        _, connection = await loop.create_connection(make, host, port, ssl=context)
        return connection

    def _heard(self, push: list[Any]) -> None:
        if len(push) == 3 and push[0] == b"message" and (channel := self._channels.get(push[1])):
            channel[0](push[2])


class _Connection(asyncio.Protocol):
    """One socket: `lost` ends with the reason when it is of no more use."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        pending_max: int,
        heard: Callable[[list[Any]], None],
    ) -> None:
        self.lost: asyncio.Future[str] = loop.create_future()
        self.is_lost = False
        self._loop = loop
        self._timeout_s = timeout_s
        self._pending_max = pending_max
        self._heard = heard
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._transport: asyncio.Transport | None = None
        self._pending: deque[tuple[Hearer | None, float]] = deque()
        self._unsent: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None

    def call(self, command: tuple[Argument, ...]) -> asyncio.Future[Any]:
        waiting = Waiting()
        self.ask(pack(*command), waiting)
        return waiting.future

    def ask(self, packed: bytes, hearer: Hearer | None) -> None:
        if len(self._pending) >= self._pending_max:
            raise RedisUnavailable("too many commands wait for Redis")
        now_s = self._loop.time()
        self._pending.append((hearer, now_s))
        if self._watch is None:
            self._watch = self._loop.call_at(now_s + self._timeout_s, self._check_late, False)
        self.write(packed)

    def write(self, packed: bytes) -> None:
        """Send a command that has no reply of its own."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(packed)

    def close(self, reason: str) -> None:
        """Fail everything that waits, and hang up."""
        if self.is_lost:
            return
        self.is_lost = True
        self.lost.set_result(reason)
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.abort()
        pending, self._pending = self._pending, deque()
        for hearer, _ in pending:
            if hearer is not None:
                _tell(hearer, RedisUnavailable(reason))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _NOTHING:
                if isinstance(reply, hiredis.PushNotification):
                    self._heard(reply)
                    continue
                hearer, _ = self._pending.popleft()
                if hearer is not None:
                    _tell(hearer, CommandRefused(str(reply)) if isinstance(reply, hiredis.ReplyError) else reply)
        except (hiredis.ProtocolError, IndexError):
            self.close("Redis broke the protocol")

    def connection_lost(self, exc: Exception | None) -> None:
        self.close("Redis closed the connection")

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None and not self.is_lost:
            self._transport.write(b"".join(unsent))

    def _check_late(self, again: bool) -> None:
        """Hang up when the oldest reply is late. A loop that was busy itself gets one more look at the socket first."""
        self._watch = None
        if not self._pending:
            return
        due = self._pending[0][1] + self._timeout_s
        now = self._loop.time()
        if now < due:
            self._watch = self._loop.call_at(due, self._check_late, False)
        elif not again:
            self._watch = self._loop.call_later(LATE_GRACE_S, self._check_late, True)
        else:
            self.close(f"no reply within {self._timeout_s * 1000:.0f} ms")


class Waiting:
    """A Hearer that is a future: for who awaits a reply. One that is given up hears nothing."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def is_gone(self) -> bool:
        return self.future.done()

    def hear(self, reply: Any) -> None:
        if self.future.done():
            return
        if isinstance(reply, RedisUnavailable):
            self.future.set_exception(reply)
            self.future.add_done_callback(_retrieve)
        else:
            self.future.set_result(reply)


def _tell(hearer: Hearer, reply: Any) -> None:
    """One that fails takes no other's reply away."""
    try:
        hearer.hear(reply)
    except Exception:
        log.exception("redis_reply_crashed")


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Mark a failure as seen: a caller that went away does not look."""
    if not future.cancelled():
        future.exception()
