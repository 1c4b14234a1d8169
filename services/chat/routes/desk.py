"""What every route that generates does: idempotency keys, keeping, sending."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from services.chat.domain.request import ChatRequest
from services.chat.errors import bad_cache_header, bad_idempotency_key
from services.chat.routes.answering import Answering, Events
from services.chat.routes.frames import Shape, new_id
from services.chat.service.cache import ResponseCache, is_deterministic
from services.chat.service.completion import ChatService
from services.chat.service.library import Draft, Library
from services.chat.service.replays import Replays, Ticket, replayed
from shared.clock import Clock
from shared.identity import Identity

CACHE, USE = "tollgate-cache", "use"
IDEMPOTENCY_KEY = "idempotency-key"
KEY_CHARS_MAX = 255
REPLAYED = {"idempotent-replayed": "true"}

MakeShape = Callable[[str, int], Shape]
MakeDraft = Callable[[str], Draft]


@dataclass(frozen=True, slots=True)
class Desk:
    """The services behind the routes."""

    service: ChatService
    cache: ResponseCache
    library: Library
    replays: Replays
    clock: Clock

    async def answer(
        self,
        request: Request,
        caller: Identity,
        asked: ChatRequest,
        *,
        prefix: str,
        shape: MakeShape,
        draft: MakeDraft | None = None,
    ) -> Response:
        """Generate and send. `shape` gets the answer's id and its moment in Unix seconds; `draft` says what to keep."""
        id_, created = new_id(prefix), int(self.clock.now().timestamp())
        events = self._events(request, asked, caller)  # refused before the key is claimed, or nothing would free it
        ticket = await self._claim(request, caller)
        if ticket is not None and ticket.recording is not None:
            recording = ticket.recording
            made = shape(recording.id, recording.created)
            return self._answering(replayed(recording), made, asked, replay=True)
        if draft is not None:
            events = self.library.keeping(caller, draft(id_), shape(id_, created), events)
        if ticket is not None:
            events = self.replays.keeping(ticket, id_, created, events)
        return self._answering(events, shape(id_, created), asked)

    def _answering(self, events: Events, shape: Shape, asked: ChatRequest, *, replay: bool = False) -> Response:
        return Answering(
            events,
            shape,
            stream=asked.stream,
            choices=asked.n,
            send_timeout_s=self.service.limits.send_timeout_s,
            headers=REPLAYED if replay else {},
        )

    def _events(self, request: Request, asked: ChatRequest, caller: Identity) -> Events:
        """Generated, or from the cache where the client asked for it. Raises InvalidRequest."""
        wish = request.headers.get(CACHE)
        if wish is None:
            return self.service.complete(asked, caller)
        if wish != USE:
            raise bad_cache_header(CACHE, USE)
        if not is_deterministic(asked):
            return self.service.complete(asked, caller)
        return self.cache.complete(asked, caller)

    async def _claim(self, request: Request, caller: Identity) -> Ticket | None:
        """The request's key, when it has one. Raises InvalidRequest, Conflict, Unprocessable, Unavailable."""
        key = request.headers.get(IDEMPOTENCY_KEY)
        if key is None:
            return None
        if not (0 < len(key) <= KEY_CHARS_MAX and key.isascii() and key.isprintable()):
            raise bad_idempotency_key(KEY_CHARS_MAX)
        fingerprint = hashlib.sha256(request.url.path.encode() + b"\0" + await request.body()).digest()
        return await self.replays.claim(caller, key, fingerprint)
