"""A choice of a completion, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]


@dataclass(slots=True)
class Choice:
    """A choice, put together from its deltas."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": None})
    logprobs: dict[str, Any] | None = None
    reason: str = ""

    def add(self, fields: Fields, logprobs: Fields | None) -> None:
        """Take in a delta: texts grow, calls of tools by their index."""
        for name, value in fields.items():
            if name == "tool_calls":
                self._add_calls(value or ())
            elif isinstance(value, str) and name != "role":
                self.message[name] = (self.message.get(name) or "") + value
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = {"content": []}
            self.logprobs["content"] += logprobs.get("content") or ()

    def finish(self, reason: str) -> None:
        self.reason = reason
        if self.message["content"] is None and "tool_calls" not in self.message:
            self.message["content"] = ""

    def _add_calls(self, deltas: Any) -> None:
        calls = self.message.setdefault("tool_calls", [])
        for delta in deltas:
            while len(calls) <= delta["index"]:
                calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
            call, function = calls[delta["index"]], delta.get("function", {})
            call["id"] = delta.get("id") or call["id"]
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""
