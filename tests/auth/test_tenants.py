"""Nobody reaches what belongs to another organisation: every route of the OpenAPI document is tried."""

import re
from typing import Any

from fastapi import FastAPI

from tests.auth.harness import Auth

BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("patch", "/api/v1/keys/{key_id}"): {"name": "mine now"},
    ("post", "/api/v1/admin/auth/keys/{key_id}/limits"): {"limits": {"minute": 1000}},
    ("patch", "/api/v1/organizations/{org_id}"): {"name": "mine now"},
    ("post", "/api/v1/organizations/{org_id}/service-accounts"): {"name": "mine now"},
    ("post", "/api/v1/organizations/{org_id}/invitations"): {"role": "owner"},
    ("patch", "/api/v1/organizations/{org_id}/members/{user_id}"): {"role": "member"},
    ("post", "/api/v1/admin/auth/users/{user_id}/status"): {"status": "disabled"},
}


def document(auth: Auth) -> dict[str, Any]:
    transport: Any = auth.http._transport
    app: FastAPI = transport.app
    return app.openapi()


async def test_every_route_with_an_id_refuses_another_organisations_object(auth: Auth) -> None:
    owner, stranger = await auth.user(), await auth.user()
    key = await auth.key(owner)
    path = f"/api/v1/organizations/{owner.org_id}/invitations"
    invitation = await auth.call("POST", path, token=owner.access_token, json={})
    path = f"/api/v1/organizations/{owner.org_id}/service-accounts"
    service_account = await auth.call("POST", path, token=owner.access_token, json={"name": "batch"})
    ids = {
        "key_id": key["id"],
        "session_id": (await auth.identity_of_token(owner.access_token)).session_id,
        "user_id": owner.id,
        "org_id": owner.org_id,
        "invitation_id": invitation.json()["id"],
        "service_account_id": service_account.json()["id"],
    }
    tried = 0
    for path, operations in document(auth)["paths"].items():
        for method in operations:
            if "{" not in path or "/oidc/" in path:  # a provider is nobody's
                continue
            tried += 1
            answer = await auth.call(
                method.upper(), path.format(**ids), token=stranger.access_token, json=BODIES.get((method, path))
            )
            expected = 403 if "/admin/" in path else 404
            assert answer.status_code == expected, (method, path, answer.text)
            missing = await auth.call(
                method.upper(),
                path.format(**dict.fromkeys(ids, stranger.id)),
                token=stranger.access_token,
                json=BODIES.get((method, path)),
            )
            for body in (answer.json(), missing.json()):
                body.pop("request_id")
            assert expected == 403 or answer.json() | {"request_id": 0} == missing.json() | {"request_id": 0}
    assert tried >= 21
    row = await auth.key_row(key["key"])
    assert row is not None
    assert (row["status"], row["version"]) == ("active", 1)
    assert (await auth.call("GET", "/api/v1/auth/me", token=owner.access_token)).status_code == 200


async def test_lists_show_only_ones_own(auth: Auth) -> None:
    owner, stranger = await auth.user(), await auth.user()
    await auth.key(owner)
    for path in ("/api/v1/keys", "/api/v1/auth/sessions"):
        theirs = (await auth.call("GET", path, token=stranger.access_token)).json()["data"]
        assert [row["id"] for row in theirs if "prefix" in row] == []
    mine = (await auth.call("GET", "/api/v1/auth/sessions", token=stranger.access_token)).json()["data"]
    assert len(mine) == 1


async def test_every_route_is_documented_and_none_but_the_public_keys_answers_without_an_identity(auth: Auth) -> None:
    for path, operations in document(auth)["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            assert operation["tags"], path
            assert "422" not in operation["responses"], path
            if path == "/.well-known/jwks.json":
                continue
            nowhere = path.replace("{", "").replace("}", "")
            assert (await auth.http.request(method.upper(), nowhere)).status_code in {400, 401}, path
            known = re.sub(r"\{\w+_id\}", _ANY, path)
            answer = await auth.http.request(method.upper(), known, json=BODIES.get((method, path), _BODY))
            assert answer.status_code == 401, (method, path, answer.text)


_ANY = "0190a000-0000-7000-8000-000000000000"
_BODY = {"username": "ada.l", "email": "a@b.example", "password": "x" * 12, "name": "k", "refresh_token": "x"}
