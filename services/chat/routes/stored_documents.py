"""What the OpenAPI document says of kept completions."""

from __future__ import annotations

from typing import Any

from services.chat.routes.bodies import Body
from services.chat.routes.documents import COMPLETION_EXAMPLE, answers, asks, error

_ONE = {**COMPLETION_EXAMPLE, "metadata": {"topic": "gates"}}
_NOT_STORED = {
    404: error("There is no stored completion with this id.", "invalid_request_error", "completion_not_found", "id")
}
_MESSAGE = {"id": f"{_ONE['id']}-0", "role": "user", "content": "What is Tollgate?"}
_LINE = '{"messages":[{"role":"user","content":"What is Tollgate?"}],"user_id":"…","completion":{…}}\n'
_STATISTICS = {
    "user_id": "019aa0e3-5f4e-7c31-8a55-0c7f3a4b9d10",
    "model": "chat-mini",
    "completions": 12,
    "input_tokens": 168,
    "output_tokens": 420,
    "settled": "0.0714",
    "mean_duration_ms": 180,
}


def _list(*data: Any) -> dict[str, Any]:
    ids = [d["id"] for d in data]
    return {"object": "list", "data": list(data), "first_id": ids[0], "last_id": ids[-1], "has_more": False}


LIST: dict[str, Any] = {
    "description": (
        "The organisation's completions that asked for `store: true`, newest first, as long as its retention lasts. "
        "Filter by `model`, `user_id` and `metadata[key]=value`; the next page begins `after` the last id."
    ),
    "responses": answers("A page.", _list(_ONE)),
}
EXPORT: dict[str, Any] = {
    "description": "Everything that is kept, oldest first, one JSON object a line.",
    "response_model": None,
    "responses": answers("The export.", _LINE, "application/x-ndjson"),
}
ONE: dict[str, Any] = {"responses": answers("The completion.", _ONE) | _NOT_STORED}
DELETE: dict[str, Any] = {
    "description": "It is gone at once.",
    "responses": answers("It is forgotten.", {"object": "chat.completion.deleted", "id": _ONE["id"], "deleted": True})
    | _NOT_STORED,
}
MESSAGES: dict[str, Any] = {
    "description": "What was asked.",
    "responses": answers("The messages, in order.", _list(_MESSAGE)) | _NOT_STORED,
}
STATISTICS: dict[str, Any] = {
    "description": "Of everything that is kept.",
    "responses": answers("A row for each user and model.", {"object": "list", "data": [_STATISTICS]}),
}
RETENTION: dict[str, Any] = {
    "description": "In days, for the whole organisation.",
    "responses": answers("The days.", {"days": 30}),
}


def update(body: type[Body]) -> dict[str, Any]:
    """Changing the metadata."""
    asked = asks(body, {"metadata": {"topic": "gates"}})
    return {**asked, "responses": answers("The completion as it is now.", _ONE) | _NOT_STORED}


def retention_update(body: type[Body]) -> dict[str, Any]:
    """Changing the retention."""
    description = "From now on, and for what is kept already. For people, with an access token."
    return {**asks(body, {"days": 7}), "description": description, "responses": answers("The days.", {"days": 7})}
