"""What the OpenAPI document says of these routes: bodies, answers and errors, with examples."""

from __future__ import annotations

from typing import Any

from services.chat.routes.bodies import Body
from services.chat.routes.schemas import ChatCompletionBody

_ASKED = {
    "model": "chat-mini",
    "messages": [{"role": "user", "content": "What is Tollgate?"}],
    "max_completion_tokens": 64,
}
_HEAD = {
    "id": "chatcmpl-2f6d0f8f0f0e4b1c9a7d5e31",
    "created": 1763596800,
    "model": "chat-mini",
    "system_fingerprint": "chat-mini-q8_0",
    "service_tier": "default",
}
_USAGE = {
    "prompt_tokens": 14,
    "completion_tokens": 12,
    "total_tokens": 26,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_RECEIPT = {
    "held": "0.0103",
    "settled": "0.0025",
    "tokens": {"input": 14, "cached_input": 0, "output": 12},
    "build": "chat-mini-q8_0",
    "hold_id": "019aa0e3-5f4e-7c31-8a55-0c7f3a4b9d10",
}
COMPLETION_EXAMPLE = {
    **_HEAD,
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Tollgate is a self-hosted AI inference platform.",
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
    "tollgate": _RECEIPT,
}
_STREAM = (
    'data: {"id":"chatcmpl-…","object":"chat.completion.chunk","created":1763596800,"model":"chat-mini",'
    '"system_fingerprint":"chat-mini-q8_0","service_tier":"default","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
    '"logprobs":null,"finish_reason":null}]}\n\n…\n\ndata: [DONE]\n\n'
)


def error(description: str, type_: str, code: str, param: str | None = None) -> dict[str, Any]:
    example = {"error": {"message": description, "type": type_, "param": param, "code": code}}
    return {"description": description, "content": {"application/json": {"example": example}}}


_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: error("The API key or token is missing or not valid.", "authentication_error", "invalid_api_key"),
    403: error("This needs the scope chat.", "permission_error", "insufficient_scope"),
    429: error("Too many requests. Wait as long as Retry-After says.", "rate_limit_error", "rate_limit_exceeded"),
}
_NO_MODEL = error(
    "The model `gpt-9` does not exist or you do not have access to it.",
    "invalid_request_error",
    "model_not_found",
    "model",
)


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema without $ref: inside an OpenAPI document `#/$defs` would point to nowhere."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
        return {k: _inlined(v, definitions) for k, v in schema.items() if k != "$defs"}
    if isinstance(schema, list):
        return [_inlined(v, definitions) for v in schema]
    return schema


def _body_schema(body: type[Body] = ChatCompletionBody) -> Any:
    schema = body.model_json_schema()
    return _inlined(schema, schema.get("$defs", {}))


def asks(body: type[Body], example: Any) -> dict[str, Any]:
    """A request's body, which the route reads by itself."""
    content = {"application/json": {"schema": _body_schema(body), "example": example}}
    return {"response_model": None, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


def answers(description: str, example: Any, media_type: str = "application/json") -> dict[int | str, Any]:
    """The responses of a route, its refusals included."""
    answer = {"description": description, "content": {media_type: {"example": example}}}
    return {200: answer, 400: _INVALID, **_REFUSALS}


_INVALID = error("Invalid value for 'limit': …", "invalid_request_error", "invalid_value", "limit")

IDEMPOTENCY: dict[int | str, dict[str, Any]] = {
    409: error(
        "A request with this Idempotency-Key is under way. Retry for its answer.",
        "conflict_error",
        "request_in_progress",
    ),
    422: error(
        "This Idempotency-Key was used for another request. Use a new one.",
        "invalid_request_error",
        "idempotency_mismatch",
    ),
}


COMPLETION: dict[str, Any] = {
    "description": (
        "OpenAI's chat completion. Unknown fields are ignored; known ones that are not served are refused by name "
        "(`unsupported_parameter`) unless they carry their neutral value. Credits for the worst case are held before "
        "the engine starts, and what it produced is settled after: also when the client leaves in mid-stream. "
        "`system_fingerprint` is the build that served; `tollgate` is the receipt, in credits."
    ),
    "response_model": None,
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _body_schema(),
                    "examples": {
                        "question": {"summary": "A question", "value": _ASKED},
                        "stream": {
                            "summary": "As a stream, with the usage at the end",
                            "value": {**_ASKED, "stream": True, "stream_options": {"include_usage": True}},
                        },
                    },
                }
            },
        }
    },
    "responses": {
        200: {
            "description": "The completion, or its chunks as server-sent events.",
            "content": {"application/json": {"example": COMPLETION_EXAMPLE}, "text/event-stream": {"example": _STREAM}},
        },
        400: error("'functions' is not supported here.", "invalid_request_error", "unsupported_parameter", "functions"),
        **_REFUSALS,
        402: error(
            "The wallet has not enough credits for this request. Add credits, or lower max_tokens.",
            "insufficient_quota",
            "insufficient_quota",
        ),
        404: _NO_MODEL,
        **IDEMPOTENCY,
        503: error("The model `chat-mini` is switched off by the operator.", "server_error", "model_disabled"),
    },
}

_MODEL = {
    "id": "chat-mini",
    "object": "model",
    "created": 1763596800,
    "owned_by": "tollgate",
    "kind": "chat",
    "state": "ready",
    "capabilities": ["chat.completions", "streaming", "tools"],
    "description": "A small demonstration model.",
    "context_window": 1024,
    "prices": {
        "per_request": "0.00",
        "input": "50.00",
        "cached_input": "25.00",
        "output": "150.00",
    },
    "builds": [
        {
            "name": "chat-mini-q8_0",
            "state": "ready",
            "stable": True,
            "engine": "llama.cpp",
            "quantization": "Q8_0",
            "context_window": 1024,
            "parameters": None,
        }
    ],
}

MODEL_LIST: dict[str, Any] = {
    "description": (
        "The models that this key may use. Prices are the caller's own, in credits per request and per million tokens; "
        "null while unknown."
    ),
    "responses": {
        200: {
            "description": "The models.",
            "content": {"application/json": {"example": {"object": "list", "data": [_MODEL]}}},
        },
        **_REFUSALS,
    },
}

MODEL: dict[str, Any] = {
    "description": "One model, as in the list.",
    "responses": {
        200: {"description": "The model.", "content": {"application/json": {"example": _MODEL}}},
        **_REFUSALS,
        404: _NO_MODEL,
    },
}

_TEXT_COMPLETION = {
    "id": "cmpl-2f6d0f8f0f0e4b1c9a7d5e31",
    "object": "text_completion",
    "created": 1763596800,
    "model": "chat-mini",
    "system_fingerprint": "chat-mini-q8_0",
    "choices": [{"index": 0, "text": " self-hosted platform", "logprobs": None, "finish_reason": "length"}],
    "usage": _USAGE,
    "tollgate": _RECEIPT,
}
_COUNTED = {
    "object": "tokenization",
    "model": "chat-mini",
    "count": 14,
    "max_model_len": 1024,
    "cost": {"prompt": "0.0007", "per_thousand_output_tokens": "0.15"},
}
_PAYING: dict[int | str, dict[str, Any]] = {
    status: COMPLETION["responses"][status] for status in (400, 402, 404, 409, 422, 503)
}


def text_completion(body: type[Body]) -> dict[str, Any]:
    """POST /v1/completions."""
    asked = asks(body, {"model": "chat-mini", "prompt": "Tollgate is a", "max_tokens": 4})
    description = (
        "OpenAI's older endpoint: the model goes on with a text, without a chat template; tokens of control in it are "
        "text. Holds, receipts, idempotency keys and streams are those of chat completions."
    )
    answered = answers("The completion, or its chunks as server-sent events.", _TEXT_COMPLETION)
    return {**asked, "description": description, "responses": answered | _PAYING}


def tokenize(*bodies: type[Body]) -> dict[str, Any]:
    """POST /v1/tokenize."""
    asked = asks(bodies[0], {"model": "chat-mini", "messages": _ASKED["messages"]})
    content = asked["openapi_extra"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": [_body_schema(b) for b in bodies]}
    description = (
        "Takes the body of a chat completion, or with `prompt` that of a plain one, and counts its prompt as the "
        "engine does, template and tools included. Costs nothing. `max_model_len` is the context that prompt and "
        "answer share."
    )
    not_here = {status: COMPLETION["responses"][status] for status in (404, 503)}
    return {**asked, "description": description, "responses": answers("The count.", _COUNTED) | not_here}
