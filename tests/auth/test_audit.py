"""Operators read the audit log, page by page and filtered."""

from datetime import timedelta
from typing import Any

import pytest

from tests.auth.harness import ADDRESS, Auth, User

AUDIT = "/api/v1/admin/auth/audit"


async def read(auth: Auth, operator: User, **query: Any) -> list[dict[str, Any]]:
    """All lines, over as many pages as they take."""
    lines: list[dict[str, Any]] = []
    while True:
        answer = await auth.call("GET", AUDIT, token=operator.access_token, params=query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert page["has_more"] == (page["next_cursor"] is not None)
        lines += page["data"]
        if not page["has_more"]:
            return lines
        query["cursor"] = page["next_cursor"]


async def test_the_log_is_filtered_by_actor_organisation_action_and_time(auth: Auth) -> None:
    operator, user = await auth.user("operator"), await auth.user()
    auth.clock.advance(1)
    start = auth.clock.now()
    keys = []
    for _ in range(3):
        keys.append(await auth.key(user))
        auth.clock.advance(1)
    await auth.call("DELETE", f"/api/v1/keys/{keys[0]['id']}", token=user.access_token)
    await auth.call("POST", f"/api/v1/admin/auth/keys/{keys[1]['id']}/revoke", token=operator.access_token)

    def actions(lines: list[dict[str, Any]]) -> list[str]:
        return [line["action"] for line in lines]

    by_org = await read(auth, operator, org=user.org_id, limit=2)
    assert actions(by_org) == ["key.revoked"] * 2 + ["key.created"] * 3 + ["user.registered"]
    assert actions(await read(auth, operator, org=user.org_id, actor=operator.id)) == ["key.revoked"]
    made = await read(auth, operator, actor=user.id, action="key.created", limit=1)
    assert [line["target_id"] for line in made] == [key["id"] for key in reversed(keys)]
    window = {"since": (start + timedelta(seconds=1)).isoformat(), "until": (start + timedelta(seconds=2)).isoformat()}
    assert [line["target_id"] for line in await read(auth, operator, org=user.org_id, **window)] == [keys[1]["id"]]
    assert await read(auth, operator, org=user.org_id, until="1971-01-01T00:00:00Z") == []

    revoked = by_org[0]
    assert (revoked["actor_user_id"], revoked["org_id"], revoked["address"]) == (operator.id, user.org_id, ADDRESS)
    assert revoked["details"] == {"before": "active", "after": "revoked"}
    assert revoked["request_id"].startswith("req_")


async def test_lines_are_in_order_and_none_is_lost_between_pages(auth: Auth) -> None:
    operator, user = await auth.user("operator"), await auth.user()
    for n in range(7):
        await auth.key(user, name=f"key-{n}")
    lines = await read(auth, operator, actor=user.id, limit=3)
    assert len({line["id"] for line in lines}) == len(lines) == 8
    assert [line["id"] for line in lines] == sorted((line["id"] for line in lines), reverse=True)


@pytest.mark.parametrize(
    "query",
    [
        {"actor": "junk"},
        {"action": "' OR 1=1 --"},
        {"action": "key"},
        {"since": "yesterday"},
        {"since": "2026-01-01T00:00:00"},
        {"since": "0001-01-01T00:00:00+14:00"},
        {"until": "9999-12-31T23:59:59Z"},
        {"limit": 0},
        {"limit": 101},
        {"cursor": "junk"},
    ],
)
async def test_bad_filters_are_refused(auth: Auth, query: dict[str, Any]) -> None:
    operator = await auth.user("operator")
    answer = await auth.call("GET", AUDIT, token=operator.access_token, params=query)
    assert (answer.status_code, answer.json()["param"]) == (400, next(iter(query)))


async def test_the_log_is_for_operators_and_their_keys_with_the_scope_admin(auth: Auth) -> None:
    user, operator = await auth.user(), await auth.user("operator")
    assert (await auth.call("GET", AUDIT, token=user.access_token)).status_code == 403
    for scopes, expected in ((["keys:read"], 403), (["admin"], 200)):
        key = await auth.key(operator, scopes=scopes)
        assert (await auth.call("GET", AUDIT, key=key["key"])).status_code == expected


async def test_no_secret_is_in_the_log(auth: Auth) -> None:
    operator, user = await auth.user("operator"), await auth.user()
    key = await auth.key(user)
    new = (await auth.call("POST", f"/api/v1/keys/{key['id']}/rotate", token=user.access_token)).json()
    text = str(await read(auth, operator, org=user.org_id))
    for secret in (key["key"], new["key"], user.access_token, user.refresh_token, user.email):
        assert secret not in text
