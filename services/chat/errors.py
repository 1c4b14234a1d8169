"""What goes wrong in chat, as the client sees it."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import (
    BadGateway,
    Conflict,
    InvalidRequest,
    NotFound,
    PaymentRequired,
    RateLimited,
    Timeout,
    TollgateError,
    Unavailable,
    Unprocessable,
)

LOADING_RETRY_S = 5
DISABLED_RETRY_S = 30
BUSY_RETRY_S = 1
DOWN_RETRY_S = 2

TOKENS_ABOVE_LIMIT = "tokens_above_limit"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
# What another build may do better, and what of it is this build's own fault.
# A silent build has had its time already: those who wait are not made to wait again.
_FALL_BACK = frozenset({"engine_unavailable", "engine_error", "overloaded"})
_FAULTS = frozenset({"engine_unavailable", "engine_error", "engine_timeout"})


def may_fall_back(error: TollgateError) -> bool:
    """Whether another build is worth a try."""
    return error.code in _FALL_BACK


def is_engine_fault(error: TollgateError) -> bool:
    """Whether the build is to blame, rather than the request or the load."""
    return error.code in _FAULTS


def builds_failing(model: str) -> Unavailable:
    return Unavailable(
        f"Every build of the model `{model}` has failed lately. Retry.",
        code="engine_unavailable",
        retry_after_s=DOWN_RETRY_S,
    )


def too_many_tokens(retry_after_s: int, headers: Mapping[str, str], *, never_fits: bool) -> TollgateError:
    if never_fits:
        return InvalidRequest(
            "The prompt and max_tokens together are more than this key's limit of tokens per minute. Lower max_tokens.",
            code=TOKENS_ABOVE_LIMIT,
            param="max_tokens",
            headers=headers,
        )
    return RateLimited(
        "The key's limit of tokens per minute is reached. Wait as long as Retry-After says, or lower max_tokens.",
        retry_after_s=retry_after_s,
        headers=headers,
    )


def not_covered() -> PaymentRequired:
    return PaymentRequired("The wallet does not cover a token for each choice. Add credits, or lower n.")


def model_not_found(model: str) -> NotFound:
    """The same for a model that does not exist and one that this key may not use."""
    return NotFound(
        f"The model `{model}` does not exist or you do not have access to it.", code="model_not_found", param="model"
    )


def no_chat(model: str, kind: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model `{model}` is for {kind}; it does not write.", code="unsupported_model", param="model"
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


def invalid_schema(param: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"The JSON schema in '{param}' cannot be used. {problem}", code="invalid_schema", param=param)


def output_violates_format() -> BadGateway:
    return BadGateway(
        "The model's answer is not of the form that response_format or the tools ask for. Retry, or simplify the form.",
        code="output_format_violated",
    )


def storage_down(detail: str) -> Unavailable:
    return Unavailable(
        "What is stored cannot be reached right now. Retry.",
        code="storage_unavailable",
        detail=detail,
        retry_after_s=DOWN_RETRY_S,
    )


def not_storable() -> InvalidRequest:
    return InvalidRequest(
        "A value of this request can be neither stored nor looked for. Text must not contain U+0000.",
        code="invalid_value",
    )


def not_stored(kind: str) -> NotFound:
    return NotFound(f"There is no stored {kind} with this id.", code=f"{kind}_not_found", param="id")


def previous_response_unknown() -> InvalidRequest:
    return InvalidRequest(
        "There is no stored response with this id.",
        code="previous_response_not_found",
        param="previous_response_id",
    )


def request_in_progress() -> Conflict:
    return Conflict(
        "A request with this Idempotency-Key is under way. Retry for its answer.",
        code="request_in_progress",
        retry_after_s=BUSY_RETRY_S,
    )


def too_many_left(count: int) -> RateLimited:
    return RateLimited(
        f"{count} requests of this key run on, although their clients have left. Wait for one to end.",
        code="concurrency_limit_exceeded",
        retry_after_s=BUSY_RETRY_S,
    )


def idempotency_mismatch() -> Unprocessable:
    return Unprocessable(
        "This Idempotency-Key was used for another request. Use a new one.", code="idempotency_mismatch"
    )


def bad_idempotency_key(chars_max: int) -> InvalidRequest:
    return InvalidRequest(
        f"Idempotency-Key takes 1 to {chars_max} printable ASCII characters.", code="invalid_idempotency_key"
    )


def bad_cache_header(name: str, value: str) -> InvalidRequest:
    return InvalidRequest(f"The header {name} takes the value `{value}` only.", code="invalid_value", param=name)
