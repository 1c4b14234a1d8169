"""What is asked for, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from services.chat.domain.schema import Constraint

Role = Literal["system", "user", "assistant", "tool"]
Choosing = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit of this service; where they come from is settings.py."""

    max_tokens_default: int
    messages_max: int
    prompt_chars_max: int
    choices_max: int
    generations_max: int
    count_timeout_s: float
    first_chunk_timeout_s: float
    chunk_timeout_s: float
    generation_timeout_s: float
    send_timeout_s: float
    load_wait_s: float = 0.0
    priority_plans: frozenset[str] = frozenset()


class Priority(IntEnum):
    """The engine's order: the smaller first."""

    PRIORITY = 1
    DEFAULT = 2
    FLEX = 3

    @property
    def tier(self) -> str:
        """As OpenAI's `service_tier` has it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made earlier in the conversation. `arguments` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the conversation. An assistant's may have calls instead of content."""

    role: Role
    content: str | None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def wire(self) -> dict[str, Any]:
        """In OpenAI's words, which are the engine's too."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            fields["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return fields


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `arguments` None: any object."""

    name: str
    description: str | None = None
    arguments: Constraint | None = None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request. `forced` names the one that must be called."""

    tools: tuple[Tool, ...] = ()
    choosing: Choosing = "none"
    forced: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request. `max_tokens` None: the client set no limit of its own; it is for each of the `n` choices.

    `sampling` is what the engine gets as it is, in OpenAI's words. A bare `prompt` stands in place of messages, and no
    template is around it.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    max_tokens: int | None = None
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    document: Constraint | None = None
    tool_use: ToolUse = ToolUse()
    stream: bool = False
    include_usage: bool = False
    priority: Priority = Priority.DEFAULT
    store: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
