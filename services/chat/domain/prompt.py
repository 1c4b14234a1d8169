"""How long a prompt can be, without asking the engine.

A token is at least a byte of text, and what a chat template adds to a conversation is the same for every message. So
bytes and two measurements of the template bound the prompt: enough to know that a short one fits its context, and to
hold credits for it. What is settled is what the engine counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.chat.domain.request import ChatRequest, Message

_EMPTY = Message("user", "")
_REPLY = Message("assistant", "")
PROBES = ((_EMPTY,), (_EMPTY, _REPLY, _EMPTY))
_EDGE_TOKENS = 2  # the beginning and the end of a text may have a token each
_BOUNDARY_TOKENS = 1  # a tokenizer may put a space before a message's text


@dataclass(frozen=True, slots=True)
class Template:
    """What a build's template adds: to a conversation of one message, and with every further one."""

    first_tokens: int
    further_tokens: int

    @classmethod
    def measured(cls, one: int, three: int) -> Template:
        """From the counts of PROBES."""
        return cls(one, max(0, -(-(three - one) // 2)))

    def bound(self, request: ChatRequest) -> int | None:
        """Tokens that the prompt has at most; None for what only the engine can tell (tools)."""
        if request.prompt is not None:
            return len(request.prompt.encode()) + _EDGE_TOKENS
        if request.tool_use.tools or any(m.tool_calls or m.tool_call_id or m.name for m in request.messages):
            return None
        text_bytes = sum(len((m.content or "").encode()) + _BOUNDARY_TOKENS for m in request.messages)
        return self.first_tokens + self.further_tokens * (len(request.messages) - 1) + text_bytes
