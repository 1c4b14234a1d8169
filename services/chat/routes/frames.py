"""The shapes that OpenAI's clients read: chunks, completions, the usage and our receipt in them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from services.chat.domain import Receipt
from services.chat.service import Settled
from shared.errors import TollgateError, openai_body
from shared.metering import Usage
from shared.money import format_credits

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Envelope:
    """What every chunk of a completion repeats. `created` is in Unix seconds; `build` comes with the first token."""

    model: str
    created: int
    include_usage: bool = False
    build: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        self.id = self.id or f"chatcmpl-{secrets.token_hex(12)}"

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None, end: Settled | None = None) -> bytes:
        """One event of the stream; `end` adds the receipt."""
        data = self._head("chat.completion.chunk")
        data["choices"] = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        if self.include_usage:
            data["usage"] = None
        if end is not None:
            data["tollgate"] = receipt(end.receipt)
        return event(data)

    def usage_chunk(self, end: Settled) -> bytes:
        """The last event of a stream with include_usage."""
        data = self._head("chat.completion.chunk")
        data |= {"choices": [], "usage": usage(end.usage), "tollgate": receipt(end.receipt)}
        return event(data)

    def completion(self, message: Mapping[str, Any], finish_reason: str, end: Settled) -> bytes:
        """The whole answer of a request without a stream."""
        data = self._head("chat.completion")
        data |= {
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
            "usage": usage(end.usage),
            "tollgate": receipt(end.receipt),
        }
        return orjson.dumps(data)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.build,
        }


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def error_event(error: TollgateError) -> bytes:
    """How an error looks once the stream has begun."""
    return event(openai_body(error))


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.input_tokens,
        "completion_tokens": used.output_tokens,
        "total_tokens": used.input_tokens + used.output_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_input_tokens},
    }


def receipt(bill: Receipt) -> dict[str, str | None]:
    """Decimal strings of credits. `settled` is null while the ledger is away: it settles later."""
    return {
        "held": format_credits(bill.held_nano),
        "settled": None if bill.settled_nano is None else format_credits(bill.settled_nano),
        "build": bill.build,
        "hold_id": bill.hold_id,
    }
