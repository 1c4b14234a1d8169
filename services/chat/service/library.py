"""Kept conversations: what `store: true` asks for."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from services.chat.domain.choice import Choice
from services.chat.domain.stored import Kind, Statistics, Stored, Wanted
from services.chat.errors import not_stored
from services.chat.repository.stored import StoredRepository
from services.chat.service.events import Delta, Event, Finished, Settled, Started
from shared.clock import Clock
from shared.errors import TollgateError
from shared.identity import Identity
from shared.telemetry import get_logger

log = get_logger(__name__)

Events = AsyncGenerator[Event, None]


class Rendering(Protocol):
    """How a finished answer looks: the documents that are kept are the ones that are sent."""

    def start(self, event: Started) -> bytes:
        """Learn which build answers."""

    def wire(self, choices: Sequence[Choice], event: Settled) -> dict[str, Any]:
        """The document."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known of a conversation before it is answered."""

    id: str
    kind: Kind
    model: str
    messages: Sequence[Mapping[str, Any]]
    metadata: Mapping[str, str]
    choices: int = 1


class Library:
    """Keeps, lists and forgets. Everything belongs to the caller's organisation."""

    def __init__(self, repository: StoredRepository, clock: Clock) -> None:
        self._repository = repository
        self._clock = clock

    async def keeping(self, caller: Identity, draft: Draft, rendering: Rendering, events: Events) -> Events:
        """The events; the answer is kept before its last one is told."""
        began_s = time.perf_counter()
        choices = [Choice() for _ in range(draft.choices)]
        build = ""
        async with aclosing(events) as source:
            async for event in source:
                match event:
                    case Started():
                        build = event.build
                        rendering.start(event)
                    case Delta():
                        choices[event.index].add(event.fields, event.logprobs)
                    case Finished():
                        choices[event.index].finish(event.reason)
                    case Settled():
                        duration_ms = int((time.perf_counter() - began_s) * 1000)
                        document = rendering.wire(choices, event)
                        await self._keep(self._stored(caller, draft, build, document, event, duration_ms))
                yield event

    def _stored(
        self,
        caller: Identity,
        draft: Draft,
        build: str,
        document: dict[str, Any],
        end: Settled,
        duration_ms: int,
    ) -> Stored:
        return Stored(
            id=draft.id,
            kind=draft.kind,
            org_id=caller.org_id,
            user_id=caller.user_id,
            key_id=caller.key_id,
            model=draft.model,
            build=build,
            created_at=self._clock.now(),
            messages=draft.messages,
            document=document,
            metadata=draft.metadata,
            input_tokens=end.usage.input_tokens,
            output_tokens=end.usage.output_tokens,
            settled_nano=end.receipt.settled_nano,
            duration_ms=duration_ms,
        )

    async def _keep(self, item: Stored) -> None:
        try:
            await self._repository.save(item)
        except TollgateError as e:  # the answer is paid for: it is sent all the same
            log.error("completion_not_stored", code=e.code, detail=e.detail)

    async def get(self, caller: Identity, kind: Kind, id_: str) -> Stored:
        """Raises NotFound, for somebody else's as for one that is not there."""
        found = await self._repository.get(caller.org_id, kind, id_) if _is_id(id_) else None
        if found is None:
            raise not_stored(kind)
        return found

    async def page(self, caller: Identity, wanted: Wanted) -> tuple[list[Stored], bool]:
        """A page of the organisation's, and whether there is more."""
        return await self._repository.page(caller.org_id, wanted)

    def all(self, caller: Identity, kind: Kind) -> AsyncIterator[Stored]:
        """Everything, oldest first."""
        return self._repository.all(caller.org_id, kind)

    async def set_metadata(self, caller: Identity, kind: Kind, id_: str, metadata: Mapping[str, str]) -> Stored:
        """Raises NotFound."""
        if not (_is_id(id_) and await self._repository.set_metadata(caller.org_id, kind, id_, metadata)):
            raise not_stored(kind)
        return await self.get(caller, kind, id_)

    async def delete(self, caller: Identity, kind: Kind, id_: str) -> None:
        """Raises NotFound."""
        if not (_is_id(id_) and await self._repository.delete(caller.org_id, kind, id_)):
            raise not_stored(kind)

    async def statistics(self, caller: Identity) -> list[Statistics]:
        """By user and model, over everything that is kept."""
        return await self._repository.statistics(caller.org_id)

    async def retention_days(self, caller: Identity) -> int:
        return await self._repository.retention_days(caller.org_id)

    async def set_retention_days(self, caller: Identity, days: int) -> None:
        """From now on, and for what is kept already."""
        await self._repository.set_retention_days(caller.org_id, days)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isprintable()
