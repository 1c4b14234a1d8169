"""POST /v1/completions: a bare prompt goes on, without any chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag, field_validator
from starlette.responses import Response

from services.chat.domain.choice import Choice
from services.chat.domain.request import ChatRequest, Limits
from services.chat.routes import documents
from services.chat.routes.bodies import read, refuse_unsupported
from services.chat.routes.desk import Desk
from services.chat.routes.frames import DONE, event_bytes, receipt, usage
from services.chat.routes.schemas import Sampling
from services.chat.service.events import Delta, Finished, Settled, Started
from shared.errors import InvalidRequest, TollgateError, openai_body
from shared.web import Caller

SCOPE = "chat"
PREFIX = "cmpl-"
MAX_TOKENS_DEFAULT = 16  # OpenAI's
LOGPROBS_MAX = 5

Text = Annotated[str, Field(min_length=1)]


class CompletionBody(Sampling):
    """OpenAI's older completion request."""

    prompt: Annotated[
        Annotated[Text, Tag("$one")] | Annotated[list[Text], Field(min_length=1, max_length=1), Tag("$several")],
        Discriminator(lambda v: "$several" if isinstance(v, list) else "$one"),
    ] = Field(description="The text to go on with; one, as a string or as a list of one.")
    echo: bool | None = Field(default=None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(default=None, ge=0, le=LOGPROBS_MAX)
    best_of: Any = Field(default=None, description="Only 1 is supported.")
    suffix: Any = Field(default=None, description="Not supported.")

    _unsupported = field_validator("best_of", "suffix", mode="before")(refuse_unsupported)

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": max(1, self.logprobs)}
        return fields

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def create_router(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post(
        "/completions", summary="Create a completion of a bare prompt", **documents.text_completion(CompletionBody)
    )
    async def create_completion(request: Request, identity: Caller) -> Response:
        identity.require_scope(SCOPE)
        asked, body = parse(await request.body(), desk.service.limits)

        def shape(id_: str, created: int) -> TextShape:
            echo = body.text if body.echo else ""
            return TextShape(id_, created, asked.model, asked.n, asked.include_usage, echo)

        return await desk.answer(request, identity, asked, prefix=PREFIX, shape=shape)

    return router


def parse(content: bytes, limits: Limits) -> tuple[ChatRequest, CompletionBody]:
    """The body as a request. Raises InvalidRequest that names the field."""
    body = read(content, CompletionBody)
    body.check(limits)
    if len(body.text) > limits.prompt_chars_max:
        raise InvalidRequest(
            f"The prompt has more than {limits.prompt_chars_max} characters.",
            code="string_above_max_length",
            param="prompt",
        )
    asked = ChatRequest(
        model=body.model,
        prompt=body.text,
        max_tokens=MAX_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens,
        n=body.n or 1,
        sampling=body.sampling(),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )
    return asked, body


@dataclass(slots=True)
class TextShape:
    """OpenAI's older completions: texts instead of messages."""

    id: str
    created: int
    model: str
    choices: int = 1
    include_usage: bool = False
    echo: str = ""
    build: str = ""
    last: Finished | None = None
    offsets: dict[int, int] = field(default_factory=dict)

    def start(self, event: Started) -> bytes:
        self.build = event.build
        return b"".join(self._chunk(i, self.echo) for i in range(self.choices) if self.echo)

    def delta(self, event: Delta) -> bytes:
        text = event.fields.get("content") or ""
        if not text and event.logprobs is None:
            return b""
        offset = self.offsets.get(event.index, len(self.echo))
        self.offsets[event.index] = offset + len(text)
        return self._chunk(event.index, text, logprobs=_logprobs(event.logprobs, offset))

    def finish(self, event: Finished) -> bytes:
        if self.include_usage:
            return self._chunk(event.index, "", event.reason)
        due, self.last = self.last, event
        return self._chunk(due.index, "", due.reason) if due is not None else b""

    def end(self, event: Settled) -> bytes:
        if self.last is not None:
            return self._chunk(self.last.index, "", self.last.reason, end=event) + DONE
        data = self._head() | {"choices": [], "usage": usage(event.usage), "tollgate": receipt(event)}
        return event_bytes(data) + DONE

    def error(self, error: TollgateError) -> bytes:
        return event_bytes(openai_body(error))

    def document(self, choices: Sequence[Choice], event: Settled) -> bytes:
        return orjson.dumps(self.wire(choices, event))

    def wire(self, choices: Sequence[Choice], event: Settled) -> dict[str, Any]:
        made = [
            {
                "index": i,
                "text": self.echo + c.message["content"],
                "logprobs": _logprobs(c.logprobs, len(self.echo)),
                "finish_reason": c.reason,
            }
            for i, c in enumerate(choices)
        ]
        return self._head() | {"choices": made, "usage": usage(event.usage), "tollgate": receipt(event)}

    def _chunk(
        self,
        index: int,
        text: str,
        reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        end: Settled | None = None,
    ) -> bytes:
        data = self._head()
        data["choices"] = [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]
        if self.include_usage:
            data["usage"] = None
        if end is not None:
            data["tollgate"] = receipt(end)
        return event_bytes(data)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.build,
        }


def _logprobs(found: Mapping[str, Any] | None, offset: int) -> dict[str, Any] | None:
    """The older form: parallel lists; `offset` is where the first token stands in the text."""
    if found is None:
        return None
    made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in found.get("content") or ():
        made["tokens"].append(token["token"])
        made["token_logprobs"].append(token["logprob"])
        made["top_logprobs"].append({t["token"]: t["logprob"] for t in token.get("top_logprobs") or ()})
        made["text_offset"].append(offset)
        offset += len(token["token"])
    return made
