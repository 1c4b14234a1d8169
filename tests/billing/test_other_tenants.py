"""Every address of billing's OpenAPI document that names something is for its owner or for operators: a new one too."""

from __future__ import annotations

import re
from uuid import uuid4

from shared.identity import Identity
from tests.billing.harness import App, signed

# What is an organisation's own. That a stranger gets 404 for one that exists: test_webhooks.py, test_payments.py.
OWN = {"webhook_id", "topup_id"}
# What names a part of the caller's own wallet, of which everybody has one.
ONES_OWN_PART = {"month", "subjects", "subject_id"}


async def test_every_address_with_an_id_is_for_its_owner_or_for_operators(app: App) -> None:
    scopes = ("billing:read", "billing:write", "admin", "*")
    stranger = Identity(
        "user", user_id=str(uuid4()), org_id=str(uuid4()), session_id=str(uuid4()), scopes=scopes, roles=("user",)
    )
    tried = {"admin": 0, "own": 0}
    for path, operations in (await app.http.get("/openapi.json")).json()["paths"].items():
        for method in operations:
            names = set(re.findall(r"{(\w+)}", path))
            is_admin = path.startswith("/api/v1/admin/")
            if not is_admin and not names - ONES_OWN_PART:
                continue
            where = re.sub(r"{\w+}", str(uuid4()), path)
            headers = signed(stranger, **{"Idempotency-Key": uuid4().hex})
            answer = await app.http.request(method.upper(), where, headers=headers)
            tried["admin" if is_admin else "own"] += 1
            assert is_admin or names <= OWN, f"{path}: say in this test whose {names} is, and test it"
            expected = {403} if is_admin else {404}
            assert answer.status_code in expected, (method, path, answer.text)
    assert tried["admin"] >= 8
    assert tried["own"] >= 6
