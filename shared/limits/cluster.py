"""Redis Cluster behind the calls of one link: a corked connection to each primary, found by the slot of a key.

    topology (redis-py's cluster client: CLUSTER SLOTS) ─► slot ─► RedisLink of the primary that serves it
          ▲ asked anew every few seconds; at once on MOVED, or when a link is down           │
          └──────────────────────────────────────────────────────────────────────────────────┘

MOVED, ASK and TRYAGAIN say that nothing ran, so those commands are sent again, up to `REDIRECTIONS_MAX` times; nothing
else ever is. Slots whose primary does not answer are RedisUnavailable at once, and all others go on. Each link has its
own time limit and is its own breaker, as without a cluster. Every primary carries the subscriptions, since a message
published anywhere reaches them all; `up` says that all of them are heard, so that a cache may be trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from redis.crc import key_slot
from redis.exceptions import RedisClusterException, RedisError

from shared.cache import CLUSTER_SUFFIX, create_cluster, is_cluster
from shared.limits.link import CommandRefused, Hear, Hearer, RedisLink, RedisUnavailable, Waiting
from shared.limits.resp import Argument, pack
from shared.telemetry import get_logger

log = get_logger(__name__)

SLOTS = 16_384
REDIRECTIONS_MAX = 3
REFRESH_S = 5.0  # a stable cluster is asked this often
REFRESH_PAUSE_S = 0.1  # a changing one


class _Command:
    """A command on its way: hears what a node says, and is sent on where that was only the way. A Hearer."""

    __slots__ = ("hearer", "name", "packed", "redirect", "redirections")

    def __init__(self, redirect: Redirect, name: str, packed: bytes, hearer: Hearer | None) -> None:
        self.redirect = redirect
        self.name = name
        self.packed = packed
        self.hearer = hearer
        self.redirections = REDIRECTIONS_MAX

    @property
    def is_gone(self) -> bool:
        return self.hearer is not None and self.hearer.is_gone

    def hear(self, reply: Any) -> None:
        if self.is_gone:
            return
        if isinstance(reply, CommandRefused) and self.redirections:
            self.redirections -= 1
            try:
                if self.redirect(str(reply), self):
                    return
            except RedisUnavailable as e:
                reply = e
        if self.hearer is not None:
            self.hearer.hear(reply)


Redirect = Callable[[str, _Command], bool]


class ClusterLink:
    """See the module. `url` is a cluster's, as in shared/cache.py.

    An async context manager: entering waits for the first attempt, whatever comes of it.
    """

    def __init__(
        self,
        url: str,
        *,
        client_name: str,
        timeout_ms: int = 100,
        connect_timeout_ms: int = 500,
        pending_max: int = 10_000,
    ) -> None:
        scheme, _, rest = url.partition("://")
        credentials, at, _ = rest.rpartition("@")
        self._prefix = f"{scheme.removesuffix(CLUSTER_SUFFIX)}://{credentials}{at}"
        self._options = {
            "client_name": client_name,
            "timeout_ms": timeout_ms,
            "connect_timeout_ms": connect_timeout_ms,
            "pending_max": pending_max,
        }
        self._topology_client = partial(
            create_cluster,
            url,
            client_name=client_name,
            timeout_ms=connect_timeout_ms,
            connect_timeout_ms=connect_timeout_ms,
        )
        self._client = self._topology_client()
        self._channels: list[tuple[str, Hear, Callable[[], None]]] = []
        self._links: dict[str, RedisLink] = {}
        self._slots: list[RedisLink | None] = [None] * SLOTS
        self._epochs_gone = 0
        self._wanted = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def up(self) -> bool:
        """Whether all primaries answer, and so all that is published is heard."""
        return bool(self._links) and all(link.up for link in self._links.values())

    @property
    def epoch(self) -> int:
        """Grows whenever a connection to one of the primaries is made."""
        return self._epochs_gone + sum([link.epoch for link in self._links.values()])

    def call(self, *command: Argument) -> asyncio.Future[Any]:
        """As RedisLink's; a command without a key goes to any node that answers."""
        waiting = Waiting()
        self.ask(_first_key(command), pack(*command), waiting)
        return waiting.future

    def send(self, *command: Argument) -> None:
        """Send a command and ignore what comes of it."""
        with contextlib.suppress(RedisUnavailable):
            self.ask(_first_key(command), pack(*command), None)

    def ask(self, name: str, packed: bytes, hearer: Hearer | None) -> None:
        """As Link's; without a name, to any node that answers."""
        self._send(self._link(name), _Command(self._redirect, name, packed, hearer))

    def subscribe(self, channel: str, hear: Hear, begin: Callable[[], None]) -> None:
        """As RedisLink's; a message is heard once from each primary. Call it before the link is entered."""
        assert self._runner is None
        self._channels.append((channel, hear, begin))

    async def __aenter__(self) -> Self:
        await self._refresh()
        self._runner = asyncio.create_task(self._run(), name="redis-cluster")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        self._closing = True  # redis-py may swallow the cancellation
        self._runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._runner
        await asyncio.gather(*[link.__aexit__(None, None, None) for link in self._links.values()])
        await self._close_client()

    def _link(self, name: str) -> RedisLink:
        if name:
            link = self._slots[key_slot(name.encode())]
        else:
            link = next((each for each in self._links.values() if each.up), None)
        if link is None or not link.up:
            self._wanted.set()
            raise RedisUnavailable("no node of the cluster answers for this")
        return link

    def _send(self, link: RedisLink, command: _Command) -> None:
        link.ask(command.name, command.packed, command)

    def _redirect(self, error: str, command: _Command) -> bool:
        """Send a command again that did not run; False when it may have. Raises RedisUnavailable."""
        kind, _, rest = error.partition(" ")
        if kind not in ("MOVED", "ASK", "TRYAGAIN"):
            return False
        if kind == "TRYAGAIN":
            self._send(self._link(command.name), command)
            return True
        self._wanted.set()
        link = self._links.get(rest.partition(" ")[2])
        if link is None:
            raise RedisUnavailable("the cluster moved a slot to a node that is not known yet")
        if kind == "ASK":
            link.send("ASKING")
        self._send(link, command)
        return True

    async def _run(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._wanted.wait()
            self._wanted.clear()
            await self._refresh()
            if not self.up:
                self._wanted.set()
            await asyncio.sleep(REFRESH_PAUSE_S)

    async def _refresh(self) -> None:
        """Ask for the topology; connect to new primaries, let go of those that are none any more."""
        try:
            # Not the client's own `initialize`: that also wants an answer from one node that it picks, dead or not.
            await self._client.nodes_manager.initialize()
        except (RedisError, RedisClusterException, OSError, TimeoutError, IndexError) as e:
            log.warning("redis_cluster_unreachable", detail=type(e).__name__)
            await self._close_client()
            self._client = self._topology_client()  # which begins with the URL's nodes again
            return
        serving = {slot: nodes[0].name for slot, nodes in self._client.nodes_manager.slots_cache.items() if nodes}
        names = set(serving.values())
        new = {name: self._new_link(name) for name in names - self._links.keys()}
        await asyncio.gather(*[link.__aenter__() for link in new.values()])
        gone = [link for name, link in self._links.items() if name not in names]
        self._links = {name: link for name, link in self._links.items() if name in names} | new
        self._epochs_gone += sum([link.epoch for link in gone])
        if new or gone:
            log.info("redis_cluster_changed", primaries=sorted(self._links))
        self._slots = [self._links.get(serving.get(slot, "")) for slot in range(SLOTS)]
        await asyncio.gather(*[link.__aexit__(None, None, None) for link in gone])

    async def _close_client(self) -> None:
        for nodes in ("nodes_cache", "startup_nodes"):
            await self._client.nodes_manager.aclose(nodes)

    def _new_link(self, name: str) -> RedisLink:
        link = RedisLink(f"{self._prefix}{name}", **self._options)  # type: ignore[arg-type]  # of one dictionary
        for channel in self._channels:
            link.subscribe(*channel)
        return link


def create_link(
    url: str, *, client_name: str, timeout_ms: int = 100, connect_timeout_ms: int = 500, pending_max: int = 10_000
) -> RedisLink | ClusterLink:
    """The link for a URL: of one server, or of a cluster as shared/cache.py has it."""
    kind = ClusterLink if is_cluster(url) else RedisLink
    return kind(
        url,
        client_name=client_name,
        timeout_ms=timeout_ms,
        connect_timeout_ms=connect_timeout_ms,
        pending_max=pending_max,
    )


def _first_key(command: tuple[Argument, ...]) -> str:
    """The key by which a command finds its node; empty for a command without one."""
    verb = command[0]
    if verb in ("EVALSHA", "EVAL"):
        return str(command[3]) if int(command[2]) else ""
    return str(command[1]) if len(command) > 1 and verb not in ("PING", "SCRIPT", "CLIENT", "INFO") else ""
