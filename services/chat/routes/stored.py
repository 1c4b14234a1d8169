"""Kept completions: OpenAI's /v1/chat/completions of `store: true`, export, statistics and retention."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from services.chat.domain.stored import Stored, Wanted
from services.chat.routes import stored_documents as documents
from services.chat.routes.bodies import Body, read
from services.chat.routes.schemas import Metadata
from services.chat.service.library import Library
from shared.errors import PermissionDenied
from shared.identity import Identity
from shared.money import format_credits
from shared.web import Caller

SCOPE = "chat"
PAGE = 20
PAGE_MAX = 100
FILTER_CHARS_MAX = 512
RETENTION_DAYS_MAX = 3_650

Id = Annotated[str, Query(max_length=FILTER_CHARS_MAX)]


class UpdateBody(Body):
    """What may be changed of a kept completion."""

    metadata: Metadata


class RetentionBody(Body):
    """How long the organisation's completions are kept."""

    days: int = Field(ge=1, le=RETENTION_DAYS_MAX)


def create_router(library: Library) -> APIRouter:
    router = APIRouter(prefix="/v1/chat", tags=["chat"])

    @router.get("/completions", summary="List stored completions", **documents.LIST)
    async def list_stored(
        request: Request,
        identity: Caller,
        after: Id | None = None,
        limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE,
        order: Literal["asc", "desc"] = "desc",
        model: Id | None = None,
        user_id: Id | None = None,
    ) -> dict[str, Any]:
        wanted = Wanted("completion", limit, after, order, model, user_id, _metadata(request))
        items, more = await library.page(_scoped(identity), wanted)
        return _list([_wire(item) for item in items], more=more)

    @router.get("/completions/export", summary="Export stored completions", **documents.EXPORT)
    async def export_stored(identity: Caller) -> Response:
        lines = _lines(library.all(_scoped(identity), "completion"))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @router.get("/completions/{id}", summary="Describe a stored completion", **documents.ONE)
    async def get_stored(id: str, identity: Caller) -> dict[str, Any]:  # noqa: A002 - the path's own name
        return _wire(await library.get(_scoped(identity), "completion", id))

    @router.get("/completions/{id}/messages", summary="List its messages", **documents.MESSAGES)
    async def list_messages(id: str, identity: Caller) -> dict[str, Any]:  # noqa: A002
        item = await library.get(_scoped(identity), "completion", id)
        return _list([{"id": f"{item.id}-{i}", **m} for i, m in enumerate(item.messages)], more=False)

    @router.post("/completions/{id}", summary="Change its metadata", **documents.update(UpdateBody))
    async def update_stored(id: str, request: Request, identity: Caller) -> dict[str, Any]:  # noqa: A002
        caller, body = _scoped(identity), read(await request.body(), UpdateBody)
        return _wire(await library.set_metadata(caller, "completion", id, body.metadata))

    @router.delete("/completions/{id}", summary="Forget a stored completion", **documents.DELETE)
    async def delete_stored(id: str, identity: Caller) -> dict[str, Any]:  # noqa: A002
        await library.delete(_scoped(identity), "completion", id)
        return {"object": "chat.completion.deleted", "id": id, "deleted": True}

    return router


def create_accounts_router(library: Library) -> APIRouter:
    """What an organisation knows and decides about everything that it keeps."""
    router = APIRouter(prefix="/v1/chat", tags=["chat"])

    @router.get("/statistics", summary="What was asked, by user and model", **documents.STATISTICS)
    async def statistics(identity: Caller) -> dict[str, Any]:
        found = await library.statistics(_scoped(identity))
        rows = [
            {
                "user_id": s.user_id,
                "model": s.model,
                "completions": s.completions,
                "input_tokens": s.input_tokens,
                "output_tokens": s.output_tokens,
                "settled": format_credits(s.settled_nano),
                "mean_duration_ms": s.mean_duration_ms,
            }
            for s in found
        ]
        return {"object": "list", "data": rows}

    @router.get("/retention", summary="How long completions are kept", **documents.RETENTION)
    async def get_retention(identity: Caller) -> dict[str, int]:
        return {"days": await library.retention_days(_scoped(identity))}

    @router.put(
        "/retention", summary="Change how long completions are kept", **documents.retention_update(RetentionBody)
    )
    async def set_retention(request: Request, identity: Caller) -> dict[str, int]:
        body = read(await request.body(), RetentionBody)
        if _scoped(identity).kind != "user":
            raise PermissionDenied("A person changes this, with an access token; a key may not.")
        await library.set_retention_days(identity, body.days)
        return {"days": body.days}

    return router


def _scoped(identity: Identity) -> Identity:
    identity.require_scope(SCOPE)
    return identity


def _metadata(request: Request) -> dict[str, str]:
    """OpenAI's way to filter: ?metadata[key]=value."""
    return {
        name[len("metadata[") : -1]: value[:FILTER_CHARS_MAX].replace("\0", "")
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]") and "\0" not in name
    }


def _wire(item: Stored) -> dict[str, Any]:
    return {**item.document, "metadata": item.metadata}


def _list(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    ids = [d["id"] for d in data]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


async def _lines(items: AsyncIterator[Stored]) -> AsyncIterator[bytes]:
    async for item in items:
        yield orjson.dumps({"messages": item.messages, "user_id": item.user_id, "completion": _wire(item)}) + b"\n"
