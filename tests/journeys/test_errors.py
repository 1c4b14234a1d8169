"""Errors as OpenAI's SDK raises them, and in the dialect of their path."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import httpx
import openai
import pytest

from shared.identity import HEADER
from tests.journeys.people import QUESTION, TIMEOUT_S, User, asking, client
from tests.running_stack import RunningStack

MESSAGES: Any = list(QUESTION)


def test_a_wrong_key_is_an_authentication_error(user: User) -> None:
    wrong = user.key[:-1] + ("x" if user.key[-1] != "x" else "y")
    for key in (wrong, "sk-nonsense", "tg_live_" + "a" * 43 + "_aaaaaa"):
        with pytest.raises(openai.AuthenticationError) as e:
            user.openai(api_key=key).chat.completions.create(model="chat-mini", messages=MESSAGES)
        assert e.value.code == "invalid_api_key"
        assert e.value.response.headers["x-request-id"]


def test_a_key_without_the_scope_is_a_permission_error(user: User) -> None:
    key = user.new_key(scopes=["models"])["key"]
    sdk = user.openai(api_key=key)
    assert sdk.models.list().data
    with pytest.raises(openai.PermissionDeniedError) as e:
        sdk.chat.completions.create(model="chat-mini", messages=MESSAGES)
    assert e.value.code == "insufficient_scope"


def test_an_unknown_model_is_a_not_found_error(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as e:
        openai_client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-9")


def test_a_model_outside_the_keys_list_does_not_exist_for_it(user: User) -> None:
    sdk = user.openai(api_key=user.new_key(models=["something-else"])["key"])
    with pytest.raises(openai.NotFoundError) as e:
        sdk.chat.completions.create(model="chat-mini", messages=MESSAGES)
    assert e.value.code == "model_not_found"
    assert sdk.models.list().data == []


def test_what_is_not_supported_is_a_bad_request_that_names_it(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as e:
        openai_client.chat.completions.create(model="chat-mini", messages=MESSAGES, modalities=["audio"])
    assert (e.value.code, e.value.param) == ("unsupported_parameter", "modalities")


def test_a_prompt_beyond_the_context_is_a_bad_request_and_costs_nothing(user: User) -> None:
    with pytest.raises(openai.BadRequestError) as e:
        user.openai().chat.completions.create(
            model="chat-mini", messages=[{"role": "user", "content": "tollgate " * 3_000}]
        )
    assert e.value.code == "context_length_exceeded"
    assert user.wallet().balance == user.wallet().available


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_required_parameter"),
        ("PUT", "/v1/chat/completions", b"", 405, "method_not_allowed"),
        ("GET", "/v1/nothing/here", b"", 404, "not_found"),
    ],
)
def test_under_v1_errors_speak_openais_dialect(
    user: User, method: str, path: str, content: bytes, status: int, code: str
) -> None:
    answer = user.api.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/v1/nothing/here", 404), ("POST", "/api/v1/billing/wallet", 405), ("GET", "/nowhere", 404)],
)
def test_elsewhere_errors_are_problem_documents(user: User, method: str, path: str, status: int) -> None:
    answer = user.session.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "detail", "code", "request_id"} <= set(answer.json())
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_body_that_is_too_large_is_refused(user: User) -> None:
    answer = user.api.post("/v1/chat/completions", json=asking(user="x" * 2_000_000))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "payload_too_large"


def test_nobody_can_bring_an_identity_of_their_own(stack: RunningStack, user: User) -> None:
    """The header is stripped: it neither opens a door without a key nor changes what a key may do."""
    now = int(time.time())
    claims = {"kind": "user", "user_id": "x", "org_id": user.org_id, "scopes": ["*", "admin"], "roles": ["admin"]}
    encoded = (
        base64.urlsafe_b64encode(json.dumps({**claims, "iat": now, "exp": now + 60}).encode()).decode().rstrip("=")
    )
    signature = hmac.new(b"guess" * 8, f"v1.k1.{encoded}".encode(), hashlib.sha256).digest()
    forged = {HEADER: f"v1.k1.{encoded}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"}
    with httpx.Client(base_url=stack.url, timeout=TIMEOUT_S) as nobody:
        assert nobody.post("/v1/chat/completions", json=asking(), headers=forged).status_code == 401
        assert nobody.get("/api/v1/billing/wallet", headers=forged).status_code == 401
        assert nobody.get("/api/v1/admin/inference/models", headers=forged).status_code == 401
    assert user.api.get("/api/v1/admin/inference/models", headers=forged).status_code == 403
    assert user.api.post("/v1/chat/completions", json=asking(max_tokens=1), headers=forged).status_code == 200


def test_services_behind_the_gateway_answer_nobody_else(stack: RunningStack, user: User) -> None:
    for service, path in (("CHAT", "/v1/models"), ("BILLING", "/api/v1/billing/wallet"), ("AUTH", "/api/v1/keys")):
        with client(stack.env[f"TOLLGATE_{service}_HTTP_URL"], user.key) as direct:
            assert direct.get(path).status_code == 401


def test_metrics_are_not_public(stack: RunningStack) -> None:
    assert httpx.get(f"{stack.url}/metrics", timeout=TIMEOUT_S).status_code == 404
