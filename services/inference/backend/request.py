"""The REQUEST tensor's JSON, checked as far as every engine needs it."""

import json
from typing import Any, Literal, NamedTuple, cast, get_args

from services.inference.backend.errors import BackendError

Op = Literal["chat", "embed", "rerank", "count", "probe", "status", "cancel"]
OPS: tuple[Op, ...] = get_args(Op)

TEXTS_MAX = 2048

CANARY_TENANT = "tollgate:canary"
"""Whose requests are no use of the build."""


class ParsedRequest(NamedTuple):
    """`body` is the request without `op`: an OpenAI chat body with `messages` or a bare `prompt`, of `embed` the texts
    `input`, of `rerank` a `query` and `documents`, of `cancel` the id of another `request`.
    """

    op: Op
    body: dict[str, Any]


def invalid(message: str) -> BackendError:
    return BackendError("invalid_request", message)


def parse(raw: bytes, bytes_max: int) -> ParsedRequest:
    """Raises BackendError (invalid_request)."""
    if len(raw) > bytes_max:
        raise invalid(f"The request is larger than {bytes_max} bytes.")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise invalid("The request is not valid JSON.") from None
    if not isinstance(body, dict):
        raise invalid("The request must be a JSON object.")
    op = body.pop("op", "chat")
    if op not in OPS:
        raise invalid(f"`op` must be one of {', '.join(OPS)}.")
    if op == "embed":
        _texts(body, "input")
    elif op == "cancel":
        if not isinstance(body.get("request"), str) or not body["request"]:
            raise invalid("`request` must be the id of a request.")
    elif op == "rerank":
        _texts(body, "documents")
        if not isinstance(body.get("query"), str) or not body["query"]:
            raise invalid("`query` must be a non-empty string.")
    elif "input" in body and "messages" not in body:
        _texts(body, "input")
    else:
        _chat(body)
    return ParsedRequest(cast(Op, op), body)


def _texts(body: dict[str, Any], name: str) -> None:
    texts = body.get(name)
    if not isinstance(texts, list) or not 1 <= len(texts) <= TEXTS_MAX:
        raise invalid(f"`{name}` must be an array of 1 to {TEXTS_MAX} strings.")
    if not all(isinstance(text, str) and text for text in texts):
        raise invalid(f"`{name}` must hold non-empty strings.")


def _chat(body: dict[str, Any]) -> None:
    messages, prompt = body.get("messages"), body.get("prompt")
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt or messages is not None:
            raise invalid("`prompt` must be a non-empty string, and stands in place of `messages`.")
    elif not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise invalid("`messages` must be a non-empty array of objects.")
    if body.get("n") not in (None, 1):
        raise invalid("`n` must be 1 here; send one request for each choice.")
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise invalid(f"`{name}` must be a positive integer.")
