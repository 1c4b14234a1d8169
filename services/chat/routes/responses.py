"""/v1/responses: OpenAI's newer API. A response is kept unless `store` is false; the next may follow on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from services.chat.domain.request import Message, ToolCall
from services.chat.domain.stored import Stored
from services.chat.errors import previous_response_unknown
from services.chat.routes import response_documents as documents
from services.chat.routes.desk import Desk
from services.chat.routes.response_bodies import ResponseBody, parse
from services.chat.routes.response_frames import ResponseShape
from services.chat.service.library import Draft, Library
from shared.errors import NotFound
from shared.identity import Identity
from shared.web import Caller

SCOPE = "chat"
PREFIX = "resp_"


def create_router(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/v1/responses", tags=["chat"])
    library = desk.library

    @router.post("", summary="Create a response", **documents.create(ResponseBody))
    async def create_response(request: Request, identity: Caller) -> Response:
        identity.require_scope(SCOPE)
        asked = parse(await request.body())
        history = await _history(library, identity, asked.body.previous_response_id)
        chat = asked.chat(history, desk.service.limits)

        def shape(id_: str, created: int) -> ResponseShape:
            return ResponseShape(id_, created, asked)

        def draft(id_: str) -> Draft:
            messages = [m.wire() for m in (*history, *asked.said)]
            return Draft(id_, "response", chat.model, messages, chat.metadata)

        return await desk.answer(
            request, identity, chat, prefix=PREFIX, shape=shape, draft=draft if chat.store else None
        )

    @router.get("/{id}", summary="Describe a response", **documents.ONE)
    async def get_response(id: str, identity: Caller) -> dict[str, Any]:  # noqa: A002 - the path's own name
        identity.require_scope(SCOPE)
        return dict((await library.get(identity, "response", id)).document)

    @router.delete("/{id}", summary="Forget a response", **documents.DELETE)
    async def delete_response(id: str, identity: Caller) -> dict[str, Any]:  # noqa: A002
        identity.require_scope(SCOPE)
        await library.delete(identity, "response", id)
        return {"id": id, "object": "response.deleted", "deleted": True}

    return router


async def _history(library: Library, caller: Identity, previous: str | None) -> tuple[Message, ...]:
    """The conversation up to a response, its answer included. Raises InvalidRequest when it is not there."""
    if previous is None:
        return ()
    try:
        found = await library.get(caller, "response", previous)
    except NotFound as e:
        raise previous_response_unknown() from e
    return (*(_message(m) for m in found.messages), *_answer(found))


def _message(wire: Mapping[str, Any]) -> Message:
    """The inverse of Message.wire."""
    calls = tuple(
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in wire.get("tool_calls", ())
    )
    return Message(wire["role"], wire["content"], wire.get("name"), calls, wire.get("tool_call_id"))


def _answer(found: Stored) -> Iterator[Message]:
    """What the response said, as one message."""
    text: str | None = None
    calls: tuple[ToolCall, ...] = ()
    for item in found.document["output"]:
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"])
        else:
            calls += (ToolCall(item["call_id"], item["name"], item["arguments"]),)
    if text is not None or calls:
        yield Message("assistant", text, tool_calls=calls)
