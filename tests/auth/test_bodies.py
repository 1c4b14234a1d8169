"""Hostile bodies and addresses: whatever comes, the answer is a problem of the 400s, never a fault of ours."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.auth.harness import Auth

PATHS = ["/api/v1/auth/register", "/api/v1/auth/login", "/api/v1/auth/refresh", "/api/v1/auth/logout", "/api/v1/keys"]
FIELDS = ["username", "email", "password", "refresh_token", "name", "scopes", "models", "limits", "expires_at"]

texts = st.text(st.characters(), max_size=40)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(["minute", "day"]), inner),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"username": "\xff"}',
        b"[" * 100_000,
        b'{"username": ' + b"9" * 5_000 + b"}",
        b'{"username": NaN}',
        b'{"username": "\\ud800", "password": "\\udfff12345678"}',
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_malformed_bodies_are_refused(auth: Auth, path: str, content: bytes) -> None:
    user = await auth.user()
    headers = {"content-type": "application/json"}
    token = user.access_token if path == "/api/v1/keys" else ""
    answer = await auth.call("POST", path, token=token, content=content, headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


async def test_a_body_that_is_too_large_is_refused(auth: Auth) -> None:
    answer = await auth.call("POST", PATHS[0], json={"username": "x" * 2_000_000})
    assert answer.status_code == 413


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(FIELDS), values, max_size=5), path=st.sampled_from(PATHS))
async def test_no_body_makes_a_fault(auth: Auth, body: dict[str, Any], path: str) -> None:
    user = await auth.user()
    token = user.access_token if path == "/api/v1/keys" else ""
    headers = {"content-type": "application/json"}
    answer = await auth.call("POST", path, token=token, content=json.dumps(body), headers=headers)
    assert answer.status_code < 500, answer.text


@pytest.mark.parametrize("path", ["/api/v1/keys/", "/api/v1/keys/..", "/api/v1/keys/%00", "/api/v1/keys/1'--"])
async def test_odd_addresses_are_not_found_or_refused_and_never_redirect(auth: Auth, path: str) -> None:
    user = await auth.user()
    answer = await auth.call("GET", path, token=user.access_token)
    assert answer.status_code in {400, 404}
