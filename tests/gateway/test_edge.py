"""What every response has, what never reaches a service, and what never leaves one."""

import httpx

from tests.gateway.harness import Backend, Directory, Gateway


async def test_a_request_with_a_key_is_relayed_with_its_identity(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    key = await directory.create_key(models=["chat-mini"])
    response = await gateway.http.post("/v1/chat/completions?a=1%202", json={"x": 1}, headers=key.headers)
    assert response.status_code == 200, response.text
    assert response.json()["path"] == "/v1/chat/completions"
    seen = backend.last
    assert (seen.method, seen.query, seen.body) == ("POST", "a=1%202", b'{"x":1}')
    identity = seen.identity
    assert (identity.kind, identity.org_id, identity.key_id) == ("key", str(key.org_id), str(key.key_id))
    assert identity.models == ("chat-mini",)
    assert identity.address == "127.0.0.1"
    assert identity.limit_id
    assert seen.header("x-request-id") == response.headers["x-request-id"]
