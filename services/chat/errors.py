"""What goes wrong in chat, as the client sees it."""

from __future__ import annotations

from shared.errors import BadGateway, InvalidRequest, NotFound, Timeout, TollgateError, Unavailable

LOADING_RETRY_S = 5
DISABLED_RETRY_S = 30
BUSY_RETRY_S = 1
DOWN_RETRY_S = 2

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


def model_not_found(model: str) -> NotFound:
    """The same for a model that does not exist and one that this key may not use."""
    return NotFound(
        f"The model `{model}` does not exist or you do not have access to it.", code="model_not_found", param="model"
    )


def model_disabled(model: str) -> Unavailable:
    return Unavailable(
        f"The model `{model}` is switched off by the operator.", code="model_disabled", retry_after_s=DISABLED_RETRY_S
    )


def model_loading(model: str) -> Unavailable:
    return Unavailable(
        f"No build of the model `{model}` is ready. Retry.", code="model_loading", retry_after_s=LOADING_RETRY_S
    )


def catalogue_unknown() -> Unavailable:
    return Unavailable(
        "The list of models has not arrived yet. Retry.", code="catalogue_unavailable", retry_after_s=DOWN_RETRY_S
    )


def too_busy() -> Unavailable:
    return Unavailable("Too many generations are under way. Retry.", code="overloaded", retry_after_s=BUSY_RETRY_S)


def context_length_exceeded(prompt_tokens: int, asked: int | None, context_tokens: int) -> InvalidRequest:
    wanted = f"{prompt_tokens} in the messages" + (f", {asked} in the completion" if asked else "")
    return InvalidRequest(
        f"This model's context holds {context_tokens} tokens, prompt and completion together; "
        f"this request wants {prompt_tokens + (asked or 1)} ({wanted}).",
        code=CONTEXT_LENGTH_EXCEEDED,
        param="messages",
    )


def engine_down(detail: str) -> Unavailable:
    return Unavailable(
        "The model's engine is not available right now. Retry.",
        code="engine_unavailable",
        detail=detail,
        retry_after_s=DOWN_RETRY_S,
    )


def engine_silent(detail: str) -> Timeout:
    return Timeout("The model's engine stopped answering. Retry.", code="engine_timeout", detail=detail)


def engine_failed(detail: str) -> BadGateway:
    return BadGateway("The model's engine failed on this request.", code="engine_error", detail=detail)


def from_engine(code: str, message: str) -> TollgateError:
    """The engine contract's error codes in ours. Its messages are public sentences."""
    if code == "invalid_request":
        return InvalidRequest(message)
    if code == CONTEXT_LENGTH_EXCEEDED:
        return InvalidRequest(message, code=code, param="messages")
    if code == "queue_full":
        return Unavailable(
            "The model's queue is full. Retry.", code="overloaded", detail=message, retry_after_s=BUSY_RETRY_S
        )
    if code == "deadline_exceeded":
        return Timeout("The model did not finish this request in time.", code=code, detail=message)
    if code == "cancelled":
        return engine_down(f"cancelled by the server: {message}")
    return engine_failed(f"{code}: {message}")
