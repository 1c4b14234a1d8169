"""What an engine writes, as the client gets it: text, documents and calls of tools, one choice at a time.

An engine need not know tools: a call that must happen is asked for as a JSON document, which the engine's grammar
enforces, and is turned into OpenAI's deltas here. Calls that may happen (`auto`) are the engine's own.
Whatever ends with `stop` or `tool_calls` was checked; an answer cut short ends with `length`, and says so.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from services.chat.domain.request import ChatRequest, Tool, ToolUse
from services.chat.domain.schema import ANY_OBJECT, Constraint
from services.chat.errors import output_violates_format

Fields = Mapping[str, Any]
STOP, LENGTH, TOOL_CALLS = "stop", "length", "tool_calls"

_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_.-]+)"\s*,\s*"arguments"\s*:\s*')


class Answer(Protocol):
    """One choice under way. Both methods give deltas of OpenAI's message."""

    def take(self, fields: Fields) -> Iterator[Fields]:
        """What the engine added."""

    def end(self, reason: str) -> tuple[str, list[Fields]]:
        """The finish_reason and what is still to be sent. Raises BadGateway (output_format_violated)."""


def answer(request: ChatRequest) -> Answer:
    """A fresh choice of a request."""
    use = request.tool_use
    if use.choosing == "required":
        return _ForcedCall(_callable(use), named=use.forced is not None)
    return _Written(request.document, use.tools if use.choosing == "auto" else ())


def engine_fields(request: ChatRequest) -> dict[str, Any]:
    """What of tools and formats the engine must know, in the words of its contract."""
    use = request.tool_use
    fields: dict[str, Any] = {}
    if use.tools:
        fields["tools"] = [_tool(t) for t in use.tools]
        fields["tool_choice"] = "auto" if use.choosing == "auto" else "none"
        if use.choosing == "auto" and not use.parallel:
            fields["parallel_tool_calls"] = False
    if use.choosing == "required":
        fields["response_format"] = _format(_call_schema(_callable(use), named=use.forced is not None))
    elif request.document is not None:
        fields["response_format"] = _format(request.document.for_engine)
    return fields


class _Written:
    """Text, a document, or calls that the engine chose to make."""

    def __init__(self, document: Constraint | None, tools: tuple[Tool, ...]) -> None:
        self._document = document
        self._tools = {t.name: t for t in tools}
        self._text: list[str] = []
        self._calls: dict[int, list[str]] = {}

    def take(self, fields: Fields) -> Iterator[Fields]:
        if self._document is not None and isinstance(text := fields.get("content"), str):
            self._text.append(text)
        for call in fields.get("tool_calls") or ():
            function = call.get("function", {})
            parts = self._calls.setdefault(int(call["index"]), [""])
            parts[0] += function.get("name") or ""
            parts.append(function.get("arguments") or "")
        yield fields

    def end(self, reason: str) -> tuple[str, list[Fields]]:
        if reason == LENGTH:
            return reason, []
        for name, *arguments in self._calls.values():
            tool = self._tools.get(name)
            if tool is None or not _arguments(tool).is_met_by("".join(arguments)):
                raise output_violates_format()
        if self._document is not None and not self._calls and not self._document.is_met_by("".join(self._text)):
            raise output_violates_format()
        return TOOL_CALLS if self._calls else reason, []


class _ForcedCall:
    """A document that is a call: the arguments alone when the tool is named, else {"name", "arguments"}."""

    def __init__(self, tools: tuple[Tool, ...], *, named: bool) -> None:
        self._tools = {t.name: t for t in tools}
        self._tool: Tool | None = tools[0] if named else None
        self._named = named
        self._announced = False
        self._unsent = ""
        self._arguments: list[str] = []

    def take(self, fields: Fields) -> Iterator[Fields]:
        text = fields.get("content")
        if not isinstance(text, str):
            return
        self._unsent += text
        if self._tool is None:
            head = _CALL_HEAD.match(self._unsent)
            if head is None or head.end() == len(self._unsent):  # the value has not begun: spaces may follow
                return
            self._tool = self._tools.get(head[1])
            if self._tool is None:
                raise output_violates_format()
            self._unsent = self._unsent[head.end() :]
        if not self._announced:
            self._announced = True
            function = {"name": self._tool.name, "arguments": ""}
            yield _call({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        if ready := self._ready():
            yield _call({"function": {"arguments": ready}})

    def end(self, reason: str) -> tuple[str, list[Fields]]:
        if reason == LENGTH:
            return reason, []
        if self._tool is None or not _arguments(self._tool).is_met_by("".join(self._arguments)):
            raise output_violates_format()
        return TOOL_CALLS, []

    def _ready(self) -> str:
        """What surely belongs to the arguments: the last brace may close the call around them."""
        kept = 0 if self._named else len(self._unsent) - self._last_brace()
        ready, self._unsent = self._unsent[: len(self._unsent) - kept], self._unsent[len(self._unsent) - kept :]
        self._arguments.append(ready)
        return ready

    def _last_brace(self) -> int:
        place = self._unsent.rfind("}")
        return len(self._unsent) if place < 0 else len(self._unsent[:place].rstrip())


def _callable(use: ToolUse) -> tuple[Tool, ...]:
    return tuple(t for t in use.tools if use.forced in (None, t.name))


def _arguments(tool: Tool) -> Constraint:
    return tool.arguments or _ANY


def _call_schema(tools: tuple[Tool, ...], *, named: bool) -> Mapping[str, Any]:
    if named:
        return _arguments(tools[0]).for_engine
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        arguments, own = _moved(_arguments(tool).for_engine, f"t{number}_")
        definitions |= own
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions} if definitions else {"anyOf": calls}


def _moved(schema: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema without its definitions, and these under names of their own, so that several can stand together."""

    def rename(node: Any) -> Any:
        if isinstance(node, list):
            return [rename(one) for one in node]
        if not isinstance(node, dict):
            return node
        if isinstance(reference := node.get("$ref"), str):
            return {"$ref": "#/$defs/" + prefix + reference.rpartition("/")[2]}
        return {key: rename(value) if key not in ("enum", "const") else value for key, value in node.items()}

    own = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    bare = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    return rename(bare), {prefix + name: rename(definition) for name, definition in own.items()}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = _arguments(tool).for_engine
    return {"type": "function", "function": function}


def _format(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _call(fields: dict[str, Any]) -> Fields:
    return {"tool_calls": [{"index": 0, **fields}]}


_ANY = Constraint(ANY_OBJECT, "tools")
