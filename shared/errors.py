"""Errors with a code, a public sentence and an internal detail, and the one table that maps them to the wire.

    TollgateError
    ├── InvalidRequest      400  INVALID_ARGUMENT
    ├── Unauthenticated     401  UNAUTHENTICATED
    ├── PaymentRequired     402  RESOURCE_EXHAUSTED
    ├── PermissionDenied    403  PERMISSION_DENIED
    ├── NotFound            404  NOT_FOUND
    ├── Conflict            409  ALREADY_EXISTS
    ├── PayloadTooLarge     413  OUT_OF_RANGE
    ├── Unprocessable       422  FAILED_PRECONDITION
    ├── RateLimited         429  RESOURCE_EXHAUSTED
    ├── Internal            500  INTERNAL
    ├── BadGateway          502  DATA_LOSS
    ├── Unavailable         503  UNAVAILABLE
    └── Timeout             504  DEADLINE_EXCEEDED

Two dialects: OpenAI's `{"error": {message, type, param, code}}` under /v1, RFC 9457 problem+json elsewhere.
`message` is public, one sentence that says what to do; `detail` goes to the log only. The gRPC code is a hint for
foreign clients; ours read the exact error from the trailing metadata (`to_metadata`, `from_metadata`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

METADATA_KEY = "tollgate-error-bin"
OPENAI_PREFIX = "/v1/"


class TollgateError(Exception):
    """Base of every error that may reach a client.

    `code` is stable and machine-readable (snake_case); `param` names the offending field of a body;
    `retry_after_s` becomes `Retry-After`, rounded up.
    """

    status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    openai_type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    default_message: ClassVar[str] = "Something went wrong on our side. Retry; if it persists, report the request id."

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        param: str | None = None,
        detail: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message or self.default_message
        self.code = code or self.default_code
        self.param = param
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        super().__init__(f"{self.code}: {self.message}" + (f" [{detail}]" if detail else ""))


class InvalidRequest(TollgateError):
    status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "invalid_request_error"
    default_code = "invalid_request"
    default_message = "The request is not valid."


class Unauthenticated(TollgateError):
    status = 401
    grpc_status = "UNAUTHENTICATED"
    openai_type = "authentication_error"
    default_code = "invalid_api_key"
    default_message = "The API key or token is missing or not valid."


class PaymentRequired(TollgateError):
    status = 402
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "insufficient_quota"
    default_code = "insufficient_quota"
    default_message = "The wallet has not enough credits for this request. Add credits, or lower max_tokens."


class PermissionDenied(TollgateError):
    status = 403
    grpc_status = "PERMISSION_DENIED"
    openai_type = "permission_error"
    default_code = "permission_denied"
    default_message = "This key or account may not do that."


class NotFound(TollgateError):
    status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "invalid_request_error"
    default_code = "not_found"
    default_message = "There is nothing at this address."


class MethodNotAllowed(TollgateError):
    status = 405
    grpc_status = "UNIMPLEMENTED"
    openai_type = "invalid_request_error"
    default_code = "method_not_allowed"
    default_message = "This address does not answer to that method."


class Conflict(TollgateError):
    status = 409
    grpc_status = "ALREADY_EXISTS"
    openai_type = "conflict_error"
    default_code = "conflict"
    default_message = "This conflicts with what is there already."


class PayloadTooLarge(TollgateError):
    status = 413
    grpc_status = "OUT_OF_RANGE"
    openai_type = "invalid_request_error"
    default_code = "payload_too_large"
    default_message = "The request body is larger than this server accepts."


class Unprocessable(TollgateError):
    status = 422
    grpc_status = "FAILED_PRECONDITION"
    openai_type = "invalid_request_error"
    default_code = "unprocessable"
    default_message = "The request contradicts an earlier one."


class RateLimited(TollgateError):
    status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    default_message = "Too many requests. Wait as long as Retry-After says."


class Internal(TollgateError):
    """A fault of ours; the base's defaults."""


class BadGateway(TollgateError):
    status = 502
    grpc_status = "DATA_LOSS"
    default_code = "bad_gateway"
    default_message = "A service behind the gateway answered with something unusable. Retry."


class Unavailable(TollgateError):
    status = 503
    grpc_status = "UNAVAILABLE"
    default_code = "service_unavailable"
    default_message = "This service is not available right now. Retry."


class Timeout(TollgateError):
    status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    default_code = "timeout"
    default_message = "A service behind the gateway did not answer in time. Retry."


BY_STATUS: dict[int, type[TollgateError]] = {
    cls.status: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        PaymentRequired,
        PermissionDenied,
        NotFound,
        MethodNotAllowed,
        Conflict,
        PayloadTooLarge,
        Unprocessable,
        RateLimited,
        Internal,
        BadGateway,
        Unavailable,
        Timeout,
    )
}


def is_openai_path(path: str) -> bool:
    """Whether errors at this path speak OpenAI's dialect."""
    return path.startswith(OPENAI_PREFIX)


def openai_body(error: TollgateError) -> dict[str, Any]:
    """OpenAI's error object, all keys always."""
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def problem_body(error: TollgateError, request_id: str) -> dict[str, Any]:
    """RFC 9457 problem details with our `code` and `request_id`."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
    }
    if error.param is not None:
        body["param"] = error.param
    return body


def render(error: TollgateError, *, path: str, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """The complete response for an error: status, headers, body, in the dialect of the path."""
    headers = {"x-request-id": request_id, **error.headers}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, -int(-error.retry_after_s // 1)))
    if error.status == 401:
        headers.setdefault("www-authenticate", 'Bearer realm="tollgate"')
    if is_openai_path(path):
        headers["content-type"] = "application/json"
        body = openai_body(error)
    else:
        headers["content-type"] = "application/problem+json"
        body = problem_body(error, request_id)
    return error.status, headers, json.dumps(body, ensure_ascii=False).encode()


def to_metadata(error: TollgateError) -> bytes:
    """The error as bytes for gRPC's trailing metadata; the internal detail stays here."""
    return json.dumps(
        {
            "status": error.status,
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "retry_after_s": error.retry_after_s,
        }
    ).encode()


def from_metadata(value: bytes) -> TollgateError:
    """The inverse of `to_metadata`; raises ValueError for anything else."""
    data = json.loads(value)
    if not isinstance(data, dict):
        raise ValueError("not an error object")
    cls = BY_STATUS.get(int(data.get("status", 500)), Internal)
    return cls(
        str(data["message"]),
        code=str(data["code"]),
        param=data.get("param"),
        retry_after_s=data.get("retry_after_s"),
        detail="from another service",
    )
