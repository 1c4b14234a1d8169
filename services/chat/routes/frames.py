"""The shapes that OpenAI's clients read: chunks, completions, the usage and our receipt in them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from services.chat.domain.choice import Choice
from services.chat.service.events import Delta, Finished, Settled, Started
from shared.errors import TollgateError, openai_body
from shared.metering import Usage
from shared.money import format_credits

DONE = b"data: [DONE]\n\n"

Fields = Mapping[str, Any]


class Shape(Protocol):
    """How the events of a completion look: as chunks of a stream, or as one document."""

    def start(self, event: Started) -> bytes:
        """What a stream begins with."""

    def delta(self, event: Delta) -> bytes:
        """One step of a stream; empty when there is nothing to say."""

    def finish(self, event: Finished) -> bytes:
        """A choice's end; empty when it waits for what follows."""

    def end(self, event: Settled) -> bytes:
        """The last of a stream, with the receipt."""

    def error(self, error: TollgateError) -> bytes:
        """How an error looks once the stream has begun."""

    def document(self, choices: Sequence[Choice], event: Settled) -> bytes:
        """The whole answer of a request without a stream."""

    def wire(self, choices: Sequence[Choice], event: Settled) -> dict[str, Any]:
        """The same before it is written."""


@dataclass(slots=True)
class ChatShape:
    """OpenAI's chat completions. `created` is in Unix seconds; `build` and `tier` come with the first token."""

    id: str
    created: int
    model: str
    choices: int = 1
    include_usage: bool = False
    top_logprobs: int = 0
    metadata: Mapping[str, str] | None = None
    build: str = ""
    tier: str = "default"
    last: Finished | None = None

    def start(self, event: Started) -> bytes:
        """Every choice's first chunk carries the role."""
        self.build, self.tier = event.build, event.tier
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.choices))

    def delta(self, event: Delta) -> bytes:
        fields = {k: v for k, v in event.fields.items() if k != "role" and v is not None}
        if not fields and event.logprobs is None:
            return b""
        return self._chunk(event.index, fields, logprobs=logprobs(event.logprobs, self.top_logprobs))

    def finish(self, event: Finished) -> bytes:
        """Without include_usage the last choice's end waits for the receipt."""
        if self.include_usage:
            return self._chunk(event.index, {}, event.reason)
        due, self.last = self.last, event
        return self._chunk(due.index, {}, due.reason) if due is not None else b""

    def end(self, event: Settled) -> bytes:
        if self.last is not None:
            return self._chunk(self.last.index, {}, self.last.reason, end=event) + DONE
        data = self._head("chat.completion.chunk")
        data |= {"choices": [], "usage": usage(event.usage), "tollgate": receipt(event)}
        return event_bytes(data) + DONE

    def error(self, error: TollgateError) -> bytes:
        return event_bytes(openai_body(error))

    def document(self, choices: Sequence[Choice], event: Settled) -> bytes:
        return orjson.dumps(self.wire(choices, event))

    def wire(self, choices: Sequence[Choice], event: Settled) -> dict[str, Any]:
        """The completion, as it is sent and as it is kept."""
        data = self._head("chat.completion")
        if self.metadata is not None:
            data["metadata"] = self.metadata
        data |= {
            "choices": [choice_wire(i, c, self.top_logprobs) for i, c in enumerate(choices)],
            "usage": usage(event.usage),
            "tollgate": receipt(event),
        }
        return data

    def _chunk(
        self,
        index: int,
        delta: Fields,
        finish_reason: str | None = None,
        logprobs: Fields | None = None,
        end: Settled | None = None,
    ) -> bytes:
        data = self._head("chat.completion.chunk")
        data["choices"] = [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        if self.include_usage:
            data["usage"] = None
        if end is not None:
            data["tollgate"] = receipt(end)
        return event_bytes(data)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.build,
            "service_tier": self.tier,
        }


def choice_wire(index: int, choice: Choice, top_logprobs: int) -> dict[str, Any]:
    """A choice as it stands in a completion."""
    return {
        "index": index,
        "message": {**choice.message, "refusal": None},
        "logprobs": logprobs(choice.logprobs, top_logprobs),
        "finish_reason": choice.reason,
    }


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def event_bytes(data: Fields) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def logprobs(found: Fields | None, top: int) -> dict[str, Any] | None:
    """OpenAI's members of it, with so many alternatives to each token; engines add more."""
    if found is None:
        return None
    return {"content": [_logprob(t, top) for t in found.get("content") or ()], "refusal": None}


def _logprob(token: Fields, top: int) -> dict[str, Any]:
    kept = _token(token)
    kept["top_logprobs"] = [_token(t) for t in token.get("top_logprobs", ())[:top]]
    return kept


def _token(token: Fields) -> dict[str, Any]:
    return {name: token[name] for name in ("token", "logprob", "bytes") if name in token}


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.input_tokens,
        "completion_tokens": used.output_tokens,
        "total_tokens": used.input_tokens + used.output_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_input_tokens},
    }


def receipt(end: Settled) -> dict[str, Any]:
    """Decimal strings of credits. `settled` is null while the ledger is away: it settles later."""
    bill, used = end.receipt, end.usage
    shown: dict[str, Any] = {
        "held": format_credits(bill.held_nano),
        "settled": None if bill.settled_nano is None else format_credits(bill.settled_nano),
        "tokens": {
            "input": used.input_tokens,
            "cached_input": used.cached_input_tokens,
            "output": used.output_tokens,
        },
        "build": bill.build,
        "hold_id": bill.hold_id,
    }
    if bill.limited_by is not None:
        shown["limited_by"] = bill.limited_by
    if bill.cached:
        shown["cached"] = True
    return shown
