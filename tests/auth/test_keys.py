"""API keys over REST: made, listed, changed, rotated, revoked."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from shared import apikeys
from tests.auth.harness import Auth, User, running
from tests.conftest import Components

KEYS = "/api/v1/keys"
DEFAULT_LIMITS = {"minute": 60, "hour": 1000, "day": 10000, "concurrency": 16, "tokens_per_minute": 100000}


async def create(auth: Auth, user: User, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = await auth.call("POST", KEYS, token=user.access_token, json={"name": "k", **body})
    return answer.status_code, answer.json()


async def test_a_new_key_has_the_published_format_and_the_plans_defaults(auth: Auth) -> None:
    user = await auth.user()
    status, made = await create(auth, user, name="  production ")
    assert status == 201
    assert apikeys.is_well_formed(made["key"])
    assert made["prefix"] == made["key"][:12]
    assert made["name"] == "production"
    assert made["scopes"] == ["chat", "models", "inference", "billing:read"]
    assert made["models"] is None
    assert made["limits"] == DEFAULT_LIMITS
    assert (made["status"], made["expires_at"], made["revoked_at"]) == ("active", None, None)


async def test_the_secret_is_shown_once_and_only_its_hmac_is_stored(auth: Auth) -> None:
    user = await auth.user()
    made = await auth.key(user)
    secret = made["key"]
    read = await auth.call("GET", f"{KEYS}/{made['id']}", token=user.access_token)
    listed = await auth.call("GET", KEYS, token=user.access_token)
    for answer in (read, listed):
        assert "key" not in answer.json()
        assert secret not in answer.text
    assert read.json() == {k: v for k, v in made.items() if k != "key"}

    random_part = secret.split("_")[2]
    async with auth.connect() as connection:
        tables = [r[0] for r in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'auth'")]
        for table in tables:
            for row in await connection.fetch(f"SELECT t::text FROM auth.{table} t"):
                assert random_part not in row[0], table
        digest = await connection.fetchval("SELECT digest FROM auth.api_key WHERE id = $1", made["id"])
    assert digest == apikeys.Peppers(auth.settings.api_key_peppers.get_secret_value()).digest(secret).hex
    assert secret not in str(await auth.redis.keys("*"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "   "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "nul\x00"}, "name"),
        ({"name": None}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": "chat"}, "scopes"),
        ({"models": ["no spaces"]}, "models.0"),
        ({"models": ["m"] * 101}, "models"),
        ({"limits": {"minute": 0}}, "limits.minute"),
        ({"limits": {"minute": "1; DROP TABLE"}}, "limits.minute"),
        ({"limits": {"minutes": 1}}, "limits.minutes"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"scope": ["chat"]}, "scope"),
        ({"org_id": "00000000-0000-0000-0000-000000000000"}, "org_id"),
    ],
)
async def test_a_bad_field_of_a_key_is_named(auth: Auth, body: dict[str, Any], param: str) -> None:
    status, problem = await create(auth, await auth.user(), **body)
    assert (status, problem["param"]) == (400, param), problem


@pytest.mark.parametrize("scopes", [["admin"], ["*"], ["chat", "admin"]])
async def test_a_user_cannot_make_a_key_with_scopes_beyond_their_own(auth: Auth, scopes: list[str]) -> None:
    user = await auth.user()
    status, problem = await create(auth, user, scopes=scopes)
    assert (status, problem["code"]) == (403, "scope_not_held")
    made = await auth.key(user)
    changed = await auth.call("PATCH", f"{KEYS}/{made['id']}", token=user.access_token, json={"scopes": scopes})
    assert changed.status_code == 403


async def test_an_operator_may_grant_admin_but_only_an_admin_everything(auth: Auth) -> None:
    operator, admin = await auth.user("operator"), await auth.user("admin")
    assert (await create(auth, operator, scopes=["admin"]))[0] == 201
    assert (await create(auth, operator, scopes=["*"]))[0] == 403
    assert (await create(auth, admin, scopes=["admin", "*"]))[0] == 201


async def test_a_key_makes_only_keys_that_can_do_no_more_than_itself(auth: Auth) -> None:
    user = await auth.user()
    made = await auth.key(user, scopes=["keys:write", "chat"], models=["chat-mini"])

    async def by_key(**body: Any) -> int:
        return (await auth.call("POST", KEYS, key=made["key"], json={"name": "k", **body})).status_code

    assert await by_key(scopes=["chat"], models=["chat-mini"]) == 201
    assert await by_key(scopes=["chat"], models=[]) == 201
    assert await by_key(models=["chat-mini"]) == 403  # the default scopes are more than it has
    assert await by_key(scopes=["billing:read"], models=["chat-mini"]) == 403
    assert await by_key(scopes=["chat"], models=["chat-mini", "other"]) == 403
    assert await by_key(scopes=["chat"]) == 403  # null would be every model
    wide = await auth.key(user, scopes=["keys:write", "chat"])
    narrow = await auth.key(user, scopes=["keys:write"])
    rotated = await auth.call("POST", f"{KEYS}/{wide['id']}/rotate", key=narrow["key"])
    assert (rotated.status_code, rotated.json()["code"]) == (403, "scope_not_held")
    for method, path, body in (
        ("POST", f"{KEYS}/{wide['id']}/rotate", {}),
        ("PATCH", f"{KEYS}/{wide['id']}", {"models": None}),
    ):
        assert (await auth.call(method, path, key=made["key"], json=body)).status_code == 403


async def test_keys_need_the_scopes_of_what_they_do_to_keys(auth: Auth) -> None:
    user = await auth.user()
    plain, reader = await auth.key(user), await auth.key(user, scopes=["keys:read"])
    assert (await auth.call("GET", KEYS, key=plain["key"])).json()["code"] == "insufficient_scope"
    assert (await auth.call("GET", KEYS, key=reader["key"])).status_code == 200
    assert (await auth.call("GET", f"{KEYS}/{plain['id']}", key=reader["key"])).status_code == 200
    for method, path in (
        ("POST", KEYS),
        ("PATCH", f"{KEYS}/{plain['id']}"),
        ("DELETE", f"{KEYS}/{plain['id']}"),
        ("POST", f"{KEYS}/{plain['id']}/revoke"),
        ("POST", f"{KEYS}/{plain['id']}/rotate"),
    ):
        body = {"name": "x"} if path == KEYS or method == "PATCH" else None
        answer = await auth.call(method, path, key=reader["key"], json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope"), path


async def test_limits_go_down_from_the_plan_and_back_but_not_above(auth: Auth) -> None:
    user = await auth.user()
    made = await auth.key(user, limits={"minute": 10, "tokens_per_minute": 500})
    path = f"{KEYS}/{made['id']}"
    assert made["limits"] == {**DEFAULT_LIMITS, "minute": 10, "tokens_per_minute": 500}

    async def patch(limits: Any) -> tuple[int, dict[str, Any]]:
        answer = await auth.call("PATCH", path, token=user.access_token, json={"limits": limits})
        return answer.status_code, answer.json()

    for above in ({"minute": 61}, {"hour": 1001}, {"concurrency": 17}, {"tokens_per_minute": 0}):
        status, problem = await patch(above)
        assert (status, problem["code"]) == (403, "limit_above_plan"), above
    assert (await create(auth, user, limits={"day": 10001}))[0] == 403
    assert (await patch({"hour": 5}))[1]["limits"] == {
        **DEFAULT_LIMITS,
        "minute": 10,
        "hour": 5,
        "tokens_per_minute": 500,
    }
    assert (await patch({"minute": None}))[1]["limits"]["minute"] == 60
    assert (await patch(None))[1]["limits"] == DEFAULT_LIMITS


async def test_a_patch_changes_what_it_names_and_nothing_else(auth: Auth) -> None:
    user = await auth.user()
    made = await auth.key(user, name="before", models=["chat-mini"])
    path = f"{KEYS}/{made['id']}"
    answer = await auth.call("PATCH", path, token=user.access_token, json={"name": "after"})
    assert answer.json() == {**{k: v for k, v in made.items() if k != "key"}, "name": "after"}
    answer = await auth.call("PATCH", path, token=user.access_token, json={"models": None, "scopes": ["chat"]})
    assert (answer.json()["models"], answer.json()["scopes"]) == (None, ["chat"])
    for body in ({"key": "tg_live_x"}, {"status": "active"}, {"limit_id": made["id"]}, {"name": None}):
        assert (await auth.call("PATCH", path, token=user.access_token, json=body)).status_code == 400


async def test_keys_are_listed_newest_first_page_by_page(auth: Auth) -> None:
    user = await auth.user()
    names = [(await auth.key(user, name=f"key-{n}"))["name"] for n in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = (await auth.call("GET", KEYS, token=user.access_token, params=query)).json()
        assert page["object"] == "list"
        seen += [key["name"] for key in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == names[::-1]
    for bad in ({"limit": 0}, {"limit": 101}, {"cursor": "junk"}, {"cursor": "é"}, {"cursor": "x" * 65}):
        assert (await auth.call("GET", KEYS, token=user.access_token, params=bad)).status_code == 400, bad


async def test_revoking_is_for_good_and_twice_is_fine(auth: Auth) -> None:
    user = await auth.user()
    made = await auth.key(user)
    path = f"{KEYS}/{made['id']}"
    first = await auth.call("POST", f"{path}/revoke", token=user.access_token)
    assert (first.status_code, first.json()["status"]) == (200, "revoked")
    auth.clock.advance(5)
    again = await auth.call("POST", f"{path}/revoke", token=user.access_token)
    assert again.json() == first.json()
    for _ in range(2):
        assert (await auth.call("DELETE", path, token=user.access_token)).status_code == 204
    for method, body in (("PATCH", {"name": "x"}), ("POST", None)):
        target = path if method == "PATCH" else f"{path}/rotate"
        answer = await auth.call(method, target, token=user.access_token, json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "key_not_active")
    async with auth.connect() as connection:
        acts = await connection.fetch("SELECT action FROM auth.audit_log WHERE target_id = $1 ORDER BY id", made["id"])
    assert [act[0] for act in acts] == ["key.created", "key.revoked"]


async def test_a_rotated_key_keeps_its_terms_and_counters_and_the_old_one_works_for_the_grace(auth: Auth) -> None:
    user = await auth.user()
    old = await auth.key(user, name="r", limits={"minute": 7}, models=["chat-mini"])
    answer = await auth.call("POST", f"{KEYS}/{old['id']}/rotate", token=user.access_token, json={"grace_s": 60})
    assert answer.status_code == 201
    new = answer.json()
    assert new["key"] != old["key"]
    assert [new[f] for f in ("name", "limits", "models", "scopes")] == [
        old[f] for f in ("name", "limits", "models", "scopes")
    ]
    old_row, new_row = await auth.key_row(old["key"]), await auth.key_row(new["key"])
    assert old_row is not None
    assert new_row is not None
    assert old_row["limit_id"] == new_row["limit_id"]
    assert old_row["expires_at"] == auth.clock.now() + timedelta(seconds=60)
    assert (old_row["version"], new_row["expires_at"]) == (2, None)
    auth.clock.advance(60)
    read = await auth.call("GET", f"{KEYS}/{old['id']}", token=user.access_token)
    assert read.json()["status"] == "expired"


async def test_the_grace_of_a_rotation_never_passes_the_old_keys_own_expiry(auth: Auth) -> None:
    user = await auth.user()
    soon = (auth.clock.now() + timedelta(seconds=30)).isoformat()
    old = await auth.key(user, expires_at=soon)
    answer = await auth.call("POST", f"{KEYS}/{old['id']}/rotate", token=user.access_token)
    assert answer.json()["expires_at"] == old["expires_at"]
    read = await auth.call("GET", f"{KEYS}/{old['id']}", token=user.access_token)
    assert read.json()["expires_at"] == old["expires_at"]


async def test_a_rotation_without_grace_revokes_the_old_key(auth: Auth) -> None:
    user = await auth.user()
    old = await auth.key(user)
    body = {"grace_s": 0}
    assert (
        await auth.call("POST", f"{KEYS}/{old['id']}/rotate", token=user.access_token, json=body)
    ).status_code == 201
    row = await auth.key_row(old["key"])
    assert row is not None
    assert row["status"] == "revoked"


async def test_of_many_rotations_at_once_without_grace_one_succeeds(auth: Auth) -> None:
    user = await auth.user()
    old = await auth.key(user)
    answers = await asyncio.gather(
        *(
            auth.call("POST", f"{KEYS}/{old['id']}/rotate", token=user.access_token, json={"grace_s": 0})
            for _ in range(5)
        )
    )
    assert sorted(a.status_code for a in answers) == [201] + [409] * 4


async def test_an_organisation_has_at_most_so_many_usable_keys(owner_url: str, components: Components) -> None:
    async with running(owner_url, components.redis_url, auth_keys_per_org_max=3) as auth:
        user = await auth.user()
        statuses = [status for status, _ in await asyncio.gather(*(create(auth, user) for _ in range(6)))]
        assert sorted(statuses) == [201] * 3 + [409] * 3
        listed = (await auth.call("GET", KEYS, token=user.access_token)).json()["data"]
        path = f"{KEYS}/{listed[1]['id']}/rotate"
        with_grace = await auth.call("POST", path, token=user.access_token, json={"grace_s": 60})
        assert (with_grace.status_code, with_grace.json()["code"]) == (409, "too_many_keys")
        assert (await auth.call("POST", path, token=user.access_token, json={"grace_s": 0})).status_code == 201
        await auth.call("DELETE", f"{KEYS}/{listed[0]['id']}", token=user.access_token)
        assert (await create(auth, user))[0] == 201


async def made_by(auth: Auth, key: dict[str, Any], **body: Any) -> httpx.Response:
    return await auth.call("POST", KEYS, key=key["key"], json={"name": "child", **body})


async def test_a_key_makes_keys_within_its_own_limits_addresses_and_life(auth: Auth) -> None:
    user = await auth.user()
    ends = auth.clock.now() + timedelta(hours=1)
    terms = {
        "scopes": ["keys:write", "models"],
        "limits": {"minute": 5, "concurrency": 2},
        "allowed_addresses": ["10.1.0.0/16", "2001:db8::/32"],
        "expires_at": ends.isoformat(),
    }
    maker = await auth.key(user, **terms)
    child = (await made_by(auth, maker, scopes=["models"])).json()
    assert child["limits"] == maker["limits"]
    assert child["allowed_addresses"] == maker["allowed_addresses"]
    assert datetime.fromisoformat(child["expires_at"]) == ends
    row = await auth.key_row(child["key"])
    assert row is not None
    assert str(row["limit_id"]) == maker["id"]  # more keys are no more requests
    narrower = await made_by(
        auth, maker, scopes=["models"], limits={"minute": 1}, allowed_addresses=["10.1.2.0/24", "2001:db8:1::/48"]
    )
    assert narrower.status_code == 201, narrower.text
    assert narrower.json()["limits"] == {**maker["limits"], "minute": 1}
    for wider, param in (
        ({"limits": {"minute": 6}}, "limits.minute"),
        ({"limits": {"concurrency": 3}}, "limits.concurrency"),
        ({"allowed_addresses": ["10.1.0.0/16", "192.0.2.0/24"]}, "allowed_addresses"),
        ({"allowed_addresses": ["10.0.0.0/8"]}, "allowed_addresses"),
        ({"allowed_addresses": ["2001::/16"]}, "allowed_addresses"),
        ({"expires_at": (ends + timedelta(seconds=1)).isoformat()}, "expires_at"),
    ):
        refused = await made_by(auth, maker, scopes=["models"], **wider)
        found = (refused.status_code, refused.json()["code"], refused.json()["param"])
        assert found == (403, "beyond_own_key", param), wider
    assert (await made_by(auth, maker, scopes=["chat"])).json()["code"] == "scope_not_held"


async def test_a_key_changes_no_key_not_even_itself_into_one_that_reaches_further(auth: Auth) -> None:
    user = await auth.user()
    wide = await auth.key(user, scopes=["keys:write"])
    maker = await auth.key(user, scopes=["keys:write"], limits={"minute": 5}, allowed_addresses=["10.1.0.0/16"])
    for target in (wide, maker):
        path = f"{KEYS}/{target['id']}"
        for body in ({"limits": {"minute": 6}}, {"limits": None}, {"allowed_addresses": None}):
            refused = await auth.call("PATCH", path, key=maker["key"], json=body)
            assert (refused.status_code, refused.json()["code"]) == (403, "beyond_own_key"), body
    stolen = await auth.call("POST", f"{KEYS}/{wide['id']}/rotate", key=maker["key"])
    assert (stolen.status_code, stolen.json()["code"]) == (403, "beyond_own_key")
    assert (await auth.call("POST", f"{KEYS}/{maker['id']}/rotate", key=maker["key"])).status_code == 201
    narrowed = await auth.call("PATCH", f"{KEYS}/{maker['id']}", key=maker["key"], json={"limits": {"minute": 4}})
    assert narrowed.status_code == 200
    assert (await made_by(auth, wide, scopes=["keys:write"], limits={"minute": 60})).status_code == 201


async def test_a_key_without_limits_of_its_own_makes_keys_that_count_by_themselves(auth: Auth) -> None:
    maker = await auth.key(await auth.user(), scopes=["keys:write", "chat"])
    child = (await made_by(auth, maker, scopes=["chat"])).json()
    row = await auth.key_row(child["key"])
    assert row is not None
    assert str(row["limit_id"]) == child["id"]
