"""One error, two dialects, and the way through gRPC and back."""

import json

import pytest

from shared import errors
from shared.errors import BY_STATUS, InvalidRequest, RateLimited, TollgateError, Unauthenticated


def test_openai_errors_have_all_keys_always() -> None:
    status, headers, body = errors.render(InvalidRequest(), path="/v1/chat/completions", request_id="req_1")
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == "req_1"
    assert json.loads(body) == {
        "error": {
            "message": "The request is not valid.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request",
        }
    }


def test_elsewhere_errors_are_problem_details() -> None:
    _, headers, body = errors.render(InvalidRequest(param="name"), path="/api/v1/keys", request_id="req_1")
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert (problem["status"], problem["code"], problem["request_id"]) == (400, "invalid_request", "req_1")
    assert problem["param"] == "name"


@pytest.mark.parametrize(("wait_s", "header"), [(0.001, "1"), (1, "1"), (1.2, "2"), (59.999, "60")])
def test_retry_after_is_never_earlier_than_the_truth(wait_s: float, header: str) -> None:
    assert errors.render(RateLimited(retry_after_s=wait_s), path="/", request_id="r")[1]["retry-after"] == header


def test_a_401_says_how_to_authenticate() -> None:
    assert "www-authenticate" in errors.render(Unauthenticated(), path="/v1/models", request_id="r")[1]


@pytest.mark.parametrize("cls", BY_STATUS.values())
def test_an_error_survives_grpc_but_its_internal_detail_stays(cls: type[TollgateError]) -> None:
    sent = cls("Say what to do.", code="some_code", param="p", retry_after_s=3, detail="password=hunter2")
    raw = errors.to_metadata(sent)
    assert b"hunter2" not in raw
    received = errors.from_metadata(raw)
    assert type(received) is cls
    assert (received.code, received.message, received.param, received.retry_after_s) == (
        "some_code",
        "Say what to do.",
        "p",
        3,
    )


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/keys"])
def test_the_internal_detail_never_reaches_a_client(path: str) -> None:
    _, headers, body = errors.render(TollgateError(detail="hunter2"), path=path, request_id="r")
    assert b"hunter2" not in body
    assert "hunter2" not in str(headers)
