"""What the OpenAPI document says of /v1/responses."""

from __future__ import annotations

from typing import Any

from services.chat.routes.bodies import Body
from services.chat.routes.documents import COMPLETION, COMPLETION_EXAMPLE, answers, asks, error

_TEXT = {
    "type": "output_text",
    "text": "Tollgate is a self-hosted AI inference platform.",
    "annotations": [],
    "logprobs": [],
}
_RESPONSE = {
    "id": "resp_2f6d0f8f0f0e4b1c9a7d5e31",
    "object": "response",
    "created_at": 1763596800,
    "status": "completed",
    "model": "chat-mini",
    "output": [
        {
            "id": "msg_2f6d0f8f0f0e4b1c9a7d5e31",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [_TEXT],
        }
    ],
    "previous_response_id": None,
    "store": True,
    "usage": {
        "input_tokens": 14,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 26,
    },
    "tollgate": COMPLETION_EXAMPLE["tollgate"],
}
_PAYING: dict[int | str, dict[str, Any]] = {
    status: COMPLETION["responses"][status] for status in (400, 402, 404, 409, 422, 503)
}
_NOT_STORED = {
    404: error("There is no stored response with this id.", "invalid_request_error", "response_not_found", "id")
}


def create(body: type[Body]) -> dict[str, Any]:
    """POST /v1/responses."""
    asked = asks(body, {"model": "chat-mini", "input": "What is Tollgate?", "max_output_tokens": 64})
    description = (
        "OpenAI's responses over the same models: text and JSON formats, functions, typed events with `stream: true`. "
        "It is kept, for as long as the organisation's retention says, unless `store` is false; then "
        "`previous_response_id` goes on with its conversation. `instructions` are for one response only."
    )
    return {**asked, "description": description, "responses": answers("The response.", _RESPONSE) | _PAYING}


ONE: dict[str, Any] = {"responses": answers("The response, as it was sent.", _RESPONSE) | _NOT_STORED}
DELETE: dict[str, Any] = {
    "description": "It is gone at once; responses that followed on it stay.",
    "responses": answers("It is forgotten.", {"id": _RESPONSE["id"], "object": "response.deleted", "deleted": True})
    | _NOT_STORED,
}
