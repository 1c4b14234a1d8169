"""What only the gateway answers."""

from __future__ import annotations

from shared.errors import InvalidRequest, TollgateError


class RequestTimeout(TollgateError):
    status = 408
    grpc_status = "DEADLINE_EXCEEDED"
    openai_type = "invalid_request_error"
    default_code = "request_timeout"
    default_message = "The request body did not arrive in time."


class UriTooLong(InvalidRequest):
    status = 414
    default_code = "uri_too_long"
    default_message = "The address is longer than this server accepts."


class HeadersTooLarge(InvalidRequest):
    status = 431
    default_code = "headers_too_large"
    default_message = "The request headers are larger than this server accepts."
