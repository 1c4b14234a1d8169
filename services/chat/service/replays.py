"""Idempotency keys: a request that is sent again gets the first one's answer, and is paid for once.

    claim ── nobody has the key ──► Ticket, then keeping(…): the answer, kept as it ends
          ── its request runs ────► Conflict (request_in_progress)
          ── another body ────────► Unprocessable (idempotency_mismatch)
          ── done ────────────────► Ticket with the recording

A request with a key runs to its end whether or not its client stays: that is what the key is for. The gateway no longer
counts one whose client has left among the concurrent ones, so this module does: who has `left_running_max` of them
running gets no further key (in each process). One that fails leaves the key free. A process that dies with one leaves
its key busy until the claim runs out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from services.chat.errors import idempotency_mismatch, request_in_progress, too_many_left
from services.chat.repository.replays import ReplayRepository
from services.chat.service.events import Event, Settled
from services.chat.service.recording import Recording
from shared.errors import TollgateError
from shared.identity import Identity
from shared.ids import uuid7
from shared.telemetry import get_logger

log = get_logger(__name__)

CLAIMS_MAX = 3
Events = AsyncGenerator[Event, None]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A claimed key, or, with a recording, an answer that is there already."""

    org_id: str
    owner: str
    key: str
    attempt: str
    recording: Recording | None = None


class Replays:
    """Holds the requests that outlive their clients; close it when nothing new comes."""

    def __init__(self, repository: ReplayRepository, left_running_max: int) -> None:
        self._repository = repository
        self._left_running_max = left_running_max
        self._left: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def claim(self, caller: Identity, key: str, fingerprint: bytes) -> Ticket:
        """See the module. A key is its caller's own. Raises TollgateError."""
        owner, attempt = caller.key_id or caller.user_id, str(uuid7())
        own = f"{owner}:{key}"
        for _ in range(CLAIMS_MAX):
            if await self._repository.claim(caller.org_id, own, fingerprint, attempt):
                ticket = Ticket(caller.org_id, owner, own, attempt)
                if self._left[owner] >= self._left_running_max:
                    await self._release(ticket)
                    raise too_many_left(self._left_running_max)
                return ticket
            found = await self._repository.find(caller.org_id, own)
            if found is None:
                continue  # it was released between the two questions
            first, result = found
            if first != fingerprint:
                raise idempotency_mismatch()
            if result is not None:
                return Ticket(caller.org_id, owner, own, attempt, Recording.decode(result))
            break
        raise request_in_progress()

    async def keeping(self, ticket: Ticket, id_: str, created: int, events: Events) -> Events:
        """The events, which go on and are kept when nobody listens any more."""
        feed: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()  # as long as the answer
        task = asyncio.create_task(self._run(ticket, id_, created, events, feed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (item := await feed.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if not task.done():
                self._left[ticket.owner] += 1
                task.add_done_callback(lambda _: self._returned(ticket.owner))

    def _returned(self, owner: str) -> None:
        self._left[owner] -= 1
        if not self._left[owner]:
            del self._left[owner]

    async def close(self, timeout_s: float) -> None:
        """Let what runs come to its end; what does not is cancelled, and its key released."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _run(
        self, ticket: Ticket, id_: str, created: int, events: Events, feed: asyncio.Queue[Event | BaseException | None]
    ) -> None:
        seen: list[Event] = []
        try:
            async with aclosing(events) as source:
                async for event in source:
                    seen.append(event)
                    if isinstance(event, Settled):
                        await self._keep(ticket, Recording(id_, created, tuple(seen)))
                    feed.put_nowait(event)
        except BaseException as e:
            await self._release(ticket)
            feed.put_nowait(e)
            if not isinstance(e, Exception):
                raise
        finally:
            feed.put_nowait(None)

    async def _keep(self, ticket: Ticket, recording: Recording) -> None:
        try:
            await self._repository.finish(ticket.org_id, ticket.key, ticket.attempt, recording.encode())
        except TollgateError as e:  # the answer is paid for: it is sent all the same
            log.error("replay_not_kept", code=e.code, detail=e.detail)

    async def _release(self, ticket: Ticket) -> None:
        try:
            await self._repository.release(ticket.org_id, ticket.key, ticket.attempt)
        except TollgateError as e:
            log.warning("replay_not_released", code=e.code, detail=e.detail)


async def replayed(recording: Recording) -> Events:
    """The events of an answer that is there already."""
    for event in recording.events:
        yield event
