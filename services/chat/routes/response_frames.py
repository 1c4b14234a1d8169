"""OpenAI's responses: the document, and the typed events of its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from services.chat.domain.answers import LENGTH
from services.chat.domain.choice import Choice
from services.chat.routes.frames import receipt
from services.chat.routes.response_bodies import Asked
from services.chat.service.events import Delta, Finished, Settled, Started
from shared.errors import TollgateError

Fields = Mapping[str, Any]


@dataclass(slots=True)
class ResponseShape:
    """One response. Its items' ids follow from its own, so that whoever makes it makes the same."""

    id: str
    created: int
    asked: Asked
    build: str = ""
    tier: str = "default"
    sequence: int = 0
    choice: Choice = field(default_factory=Choice)

    def start(self, event: Started) -> bytes:
        self.build, self.tier = event.build, event.tier
        opened = self._response("in_progress", [], None)
        return self._event("response.created", response=opened) + self._event("response.in_progress", response=opened)

    def delta(self, event: Delta) -> bytes:
        had_text, had_calls = self.choice.message["content"] is not None, len(self._calls)
        self.choice.add(event.fields, event.logprobs)
        sent = b""
        if text := event.fields.get("content"):
            if not had_text:
                sent += self._open_message()
            sent += self._text("response.output_text.delta", delta=text, logprobs=[])
        for call in event.fields.get("tool_calls") or ():
            index = call["index"]
            if index >= had_calls:
                item = {**self._call(index, "in_progress"), "arguments": ""}
                sent += self._event("response.output_item.added", output_index=self._place(index), item=item)
            if arguments := call.get("function", {}).get("arguments"):
                sent += self._of_call("response.function_call_arguments.delta", index, delta=arguments)
        return sent

    def finish(self, event: Finished) -> bytes:
        self.choice.finish(event.reason)
        sent = b""
        if self.choice.message["content"] is not None:
            message = self._message()
            if not self.choice.message["content"]:
                sent += self._open_message()
            sent += self._text("response.output_text.done", text=self.choice.message["content"], logprobs=[])
            sent += self._text("response.content_part.done", part=message["content"][0])
            sent += self._event("response.output_item.done", output_index=0, item=message)
        for index in range(len(self._calls)):
            item = self._call(index, "completed")
            sent += self._of_call("response.function_call_arguments.done", index, arguments=item["arguments"])
            sent += self._event("response.output_item.done", output_index=self._place(index), item=item)
        return sent

    def end(self, event: Settled) -> bytes:
        response = self.wire([self.choice], event)
        return self._event(f"response.{response['status']}", response=response)

    def error(self, error: TollgateError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def document(self, choices: Sequence[Choice], event: Settled) -> bytes:
        return orjson.dumps(self.wire(choices, event))

    def wire(self, choices: Sequence[Choice], event: Settled) -> dict[str, Any]:
        [self.choice] = choices
        output = [self._message()] if self.choice.message["content"] is not None else []
        output += [self._call(i, "completed") for i in range(len(self._calls))]
        status = "incomplete" if self.choice.reason == LENGTH else "completed"
        return self._response(status, output, event)

    @property
    def _calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = self.choice.message.get("tool_calls", [])
        return calls

    def _place(self, call: int) -> int:
        """Where a call stands in the output: after the message, when there is one."""
        return call + (self.choice.message["content"] is not None)

    def _message(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": self.choice.message["content"], "annotations": [], "logprobs": []}
        status = "incomplete" if self.choice.reason == LENGTH else "completed"
        return {"id": self._message_id, "type": "message", "status": status, "role": "assistant", "content": [part]}

    @property
    def _message_id(self) -> str:
        return "msg_" + self.id.removeprefix("resp_")

    def _call(self, index: int, status: str) -> dict[str, Any]:
        call = self._calls[index]
        return {
            "id": f"fc_{self.id.removeprefix('resp_')}_{index}",
            "type": "function_call",
            "status": status,
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
        }

    def _open_message(self) -> bytes:
        item = {"id": self._message_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        added = self._event("response.output_item.added", output_index=0, item=item)
        return added + self._text("response.content_part.added", part=part)

    def _text(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **fields)

    def _of_call(self, kind: str, index: int, **fields: Any) -> bytes:
        item_id = self._call(index, "in_progress")["id"]
        return self._event(kind, item_id=item_id, output_index=self._place(index), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"

    def _response(self, status: str, output: list[dict[str, Any]], end: Settled | None) -> dict[str, Any]:
        body = self.asked.body
        dumped = body.model_dump(include={"tools", "tool_choice", "text"}, exclude_none=True, by_alias=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "service_tier": self.tier,
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": dumped.get("text", {"format": {"type": "text"}}),
            "tool_choice": dumped.get("tool_choice", "auto"),
            "tools": dumped.get("tools", []),
            "top_p": body.top_p,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": None if end is None else _usage(end),
            "system_fingerprint": self.build,
            "tollgate": None if end is None else receipt(end),
        }


def _usage(end: Settled) -> dict[str, Any]:
    used = end.usage
    return {
        "input_tokens": used.input_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_input_tokens},
        "output_tokens": used.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.input_tokens + used.output_tokens,
    }
