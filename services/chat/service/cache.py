"""The response cache, for who asks for it: an answer that would be the same again is told again.

Only what is deterministic is kept (temperature 0, or a seed), and only for its own organisation: under a hash of the
build and everything that shapes the answer, in Redis, for a while, up to a size. A hit is paid as a prompt that came
from a cache entirely, without a token of output, and its receipt says so. Redis away is a miss.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import orjson

from services.chat.domain.answers import engine_fields
from services.chat.domain.request import ChatRequest
from services.chat.service.completion import ChatService
from services.chat.service.events import Event, Receipt, Settled, Started
from services.chat.service.recording import Recording
from services.chat.service.terms import Treasury
from shared.identity import Identity
from shared.limits import Link, RedisUnavailable
from shared.metering import Usage
from shared.telemetry import get_logger

log = get_logger(__name__)

Events = AsyncGenerator[Event, None]
HIT = {"tollgate-cache": "hit"}
MISS = {"tollgate-cache": "miss"}


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """How long an answer is kept, and how large it may be."""

    ttl_s: int
    bytes_max: int


class ResponseCache:
    """See the module."""

    def __init__(self, service: ChatService, treasury: Treasury, link: Link, limits: CacheLimits) -> None:
        self._service = service
        self._treasury = treasury
        self._link = link
        self._limits = limits

    async def complete(self, request: ChatRequest, caller: Identity) -> Events:
        """As ChatService.complete. Raises TollgateError."""
        name = self._name(request, caller)
        if (found := await self._get(name)) is None:
            events = self._generated(request, caller, name)
        else:
            events = self._told(found, request, caller)
        async with aclosing(events) as source:
            async for event in source:
                yield event

    async def _generated(self, request: ChatRequest, caller: Identity, name: str) -> Events:
        seen: list[Event] = []
        async with aclosing(self._service.complete(request, caller)) as events:
            async for event in events:
                seen.append(event)
                if isinstance(event, Settled) and event.receipt.limited_by is None:
                    self._put(name, Recording("", 0, tuple(seen)))
                yield replace(event, headers={**event.headers, **MISS}) if isinstance(event, Started) else event

    async def _told(self, recording: Recording, request: ChatRequest, caller: Identity) -> Events:
        """The recorded events, for the price of a cached prompt: paid before the first is told, since all are there.

        Without output tokens an unsettled hold is voided: who left before the last event would pay nothing.
        """
        *events, first = recording.events
        assert isinstance(first, Settled)
        read = first.usage.input_tokens
        async with self._treasury.hold_cached(request, caller, read) as hold:
            usage, build = Usage(read, read, 0), first.receipt.build
            settled = await hold.settle(build=build, finish_reason="cached", usage=usage)
            settled_nano = settled.settled_nano if settled is not None else None
        for event in events:
            yield replace(event, headers=HIT) if isinstance(event, Started) else event
        yield Settled(usage, Receipt(str(hold.id), build, hold.amount_nano, settled_nano, cached=True))

    def _name(self, request: ChatRequest, caller: Identity) -> str:
        build = self._service.build(request, caller)
        shape = {
            "build": [build.name, build.triton_version],
            "prompt": request.prompt,
            "messages": [m.wire() for m in request.messages],
            "sampling": request.sampling,
            "engine": engine_fields(request),
            "document": request.document.schema if request.document is not None else None,
            "limits": [request.max_tokens, request.n],
        }
        digest = hashlib.sha256(orjson.dumps(shape, option=orjson.OPT_SORT_KEYS)).hexdigest()
        return f"{{{caller.org_id}}}:answer:{digest}"

    async def _get(self, name: str) -> Recording | None:
        try:
            found = await self._link.call("GET", name)
        except RedisUnavailable as e:
            log.info("cache_unavailable", detail=str(e))
            return None
        return Recording.decode(found) if found else None

    def _put(self, name: str, recording: Recording) -> None:
        content = recording.encode()
        if len(content) <= self._limits.bytes_max:
            self._link.send("SET", name, content, "EX", self._limits.ttl_s)


def is_deterministic(request: ChatRequest) -> bool:
    """Whether the same request would be answered the same again."""
    return request.sampling.get("temperature") == 0 or "seed" in request.sampling
