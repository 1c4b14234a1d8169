"""Completions of a bare prompt, in the words of chats: the contract has one kind of chunk."""

import json
from collections.abc import Mapping
from typing import Any

# Only a chat has these.
OF_CHATS = ("messages", "response_format", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs")


def engine_body(body: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """A chat's body as llama.cpp's `/v1/completions` takes it: there `logprobs` is a number."""
    plain = {name: value for name, value in body.items() if name not in OF_CHATS}
    if body.get("logprobs"):
        plain["logprobs"] = body.get("top_logprobs") or 1
    return {**plain, "prompt": prompt}


def as_chat(chunk: str) -> str:
    """The engine's text_completion chunk as its chat.completion.chunk, `choices` first as there."""
    data = json.loads(chunk)
    if "choices" not in data:
        return chunk
    [choice] = data.pop("choices")
    delta = {"content": choice["text"]} if choice["text"] else {}
    made = {"finish_reason": choice["finish_reason"], "index": 0, "delta": delta}
    if choice.get("logprobs"):
        made["logprobs"] = choice["logprobs"]
    head = {"choices": [made], "created": data.pop("created"), "id": data.pop("id"), "model": data.pop("model")}
    head |= {"system_fingerprint": data.pop("system_fingerprint"), "object": "chat.completion.chunk"}
    data.pop("object", None)
    data.pop("usage", None)
    return json.dumps(head | data, ensure_ascii=False, separators=(",", ":"))
