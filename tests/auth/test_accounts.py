"""Registration, sign-in and profile."""

import asyncio
import json
from typing import Any

import argon2
import pytest

from services.auth.domain.fields import COMMON_PASSWORDS
from services.auth.service.passwords import Passwords
from shared.identity import Identity
from tests.auth.harness import ADDRESS, PASSWORD, Auth

LOGIN = "/api/v1/auth/login"


async def test_a_registered_user_signs_in_by_name_or_email_and_sees_their_profile(auth: Auth) -> None:
    answer = await auth.register(username="Ada.L", email="Ada@Example.com")
    assert answer.status_code == 201
    made = answer.json()
    assert made["username"] == "Ada.L"
    assert made["email"] == "Ada@example.com"
    assert made["roles"] == ["user"]

    for body in ({"username": "ada.l"}, {"email": "ADA@example.com"}, {"username": "ada@example.com"}):
        login = await auth.call("POST", LOGIN, json={**body, "password": PASSWORD})
        assert login.status_code == 200, body
        assert login.json()["token_type"] == "bearer"
        assert login.json()["expires_in"] == 900

    profile = (await auth.call("GET", "/api/v1/auth/me", token=login.json()["access_token"])).json()
    assert profile["user_id"] == made["user_id"]
    assert profile["organization"] == {"id": made["org_id"], "name": "Ada.L", "role": "owner", "plan": "default"}
    assert "admin" not in profile["scopes"]
    assert "password" not in str(profile)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("username", "ab"),
        ("username", "a" * 65),
        ("username", "white space"),
        ("username", "né"),
        ("username", "name\n"),
        ("username", 7),
        ("email", "nobody"),
        ("email", "a@b@c"),
        ("email", f"{'a' * 250}@example.com"),
        ("password", "1234567"),
        ("password", "x" * 129),
        ("password", "Password123"),
        ("password", None),
        ("password", "\ud800" * 10),
    ],
)
async def test_a_bad_field_is_named_and_its_value_is_not_repeated(auth: Auth, field: str, value: Any) -> None:
    body = {"username": "grace", "email": "grace@example.com", "password": PASSWORD, field: value}
    headers = {"content-type": "application/json"}
    answer = await auth.call("POST", "/api/v1/auth/register", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["param"] == field
    if isinstance(value, str):
        assert value not in answer.json()["detail"]


async def test_passwords_are_counted_in_characters_and_have_no_composition_rules(auth: Auth) -> None:
    for password in ("пароль-я", "é" * 128, "lowercase only words", "        "):
        answer = await auth.register(password=password)
        assert answer.status_code == 201, password
        assert (await auth.login(answer.json()["username"], password)).status_code == 200


async def test_the_same_password_typed_as_composed_or_decomposed_characters_is_the_same(auth: Auth) -> None:
    made = (await auth.register(password="caf\u00e9 cr\u00e8me")).json()
    assert (await auth.login(made["username"], "cafe\u0301 cre\u0300me")).status_code == 200


async def test_guessable_passwords_are_refused(auth: Auth) -> None:
    assert len(COMMON_PASSWORDS) >= 20
    for password in (*sorted(COMMON_PASSWORDS)[:3], "QWERTY123", "Grace.Hopper", "grace@navy.example"):
        answer = await auth.register(username="grace.hopper", email="grace@navy.example", password=password)
        assert (answer.status_code, answer.json()["code"]) == (400, "weak_password"), password


async def test_names_and_addresses_are_taken_whatever_their_case(auth: Auth) -> None:
    await auth.register(username="Linus", email="linus@example.com")
    name = await auth.register(username="LINUS")
    assert (name.status_code, name.json()["code"], name.json()["param"]) == (409, "username_taken", "username")
    email = await auth.register(email="Linus@EXAMPLE.com")
    assert (email.status_code, email.json()["code"], email.json()["param"]) == (409, "email_taken", "email")


async def test_of_many_registrations_of_one_name_at_once_exactly_one_succeeds(auth: Auth) -> None:
    answers = await asyncio.gather(*(auth.register(username="race", email=f"race{n}@example.com") for n in range(12)))
    assert sorted(a.status_code for a in answers) == [201] + [409] * 11
    async with auth.connect() as connection:
        orphans = await connection.fetchval(
            "SELECT count(*) FROM auth.organization o LEFT JOIN auth.membership m ON m.org_id = o.id WHERE m IS NULL"
        )
    assert orphans == 0


async def test_failed_sign_ins_look_the_same_whatever_failed(auth: Auth) -> None:
    known, disabled, operator = await auth.user(), await auth.user(), await auth.user("operator")
    await auth.call(
        "POST",
        f"/api/v1/admin/auth/users/{disabled.id}/status",
        token=operator.access_token,
        json={"status": "disabled"},
    )
    answers = [
        await auth.login("nobody-of-that-name"),
        await auth.login(known.username, "wrong password"),
        await auth.login(disabled.username),
        await auth.call("POST", LOGIN, json={"email": "nobody@example.com", "password": PASSWORD}),
    ]
    assert {a.status_code for a in answers} == {401}
    assert {a.json()["code"] for a in answers} == {"invalid_credentials"}
    assert len({a.json()["detail"] for a in answers}) == 1
    assert len({tuple(sorted(a.headers.keys())) for a in answers}) == 1


async def test_an_unknown_user_costs_a_whole_argon2_verification(auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    matches = Passwords._matches

    def counted(self: Passwords, stored: str, password: str) -> bool:
        seen.append(stored.rpartition("$")[0].rpartition("$")[0])  # algorithm, version, parameters
        return matches(self, stored, password)

    monkeypatch.setattr(Passwords, "_matches", counted)
    user = await auth.user()
    seen.clear()
    await auth.login("nobody-of-that-name")
    await auth.login(user.username, "wrong password")
    assert len(seen) == 2
    assert seen[0] == seen[1] == "$argon2id$v=19$m=64,t=1,p=1"


async def test_failed_sign_ins_are_audited_without_what_was_typed(auth: Auth) -> None:
    user = await auth.user()
    await auth.login(user.username, "a wrong password")
    await auth.login("my-secret-typed-as-name", "x" * 20)
    async with auth.connect("tollgate_auth") as connection:
        rows = await connection.fetch(
            "SELECT * FROM auth.audit_log WHERE action = 'sign_in.failed' ORDER BY id DESC LIMIT 2"
        )
    unknown, wrong = (dict(row) for row in rows)
    assert json.loads(unknown["details"]) == {"reason": "unknown_user"}
    assert json.loads(wrong["details"]) == {"reason": "wrong_password"}
    assert str(wrong["target_id"]) == user.id
    assert str(wrong["address"]) == ADDRESS
    assert "my-secret" not in str(rows)


async def test_a_password_hash_of_old_parameters_is_renewed_at_sign_in(auth: Auth) -> None:
    user = await auth.user()
    old = argon2.PasswordHasher(time_cost=2, memory_cost=32, parallelism=1).hash(PASSWORD)
    async with auth.connect() as connection:
        await connection.execute(
            "UPDATE auth.user_account SET password_hash = $1 WHERE username = $2", old, user.username
        )
        assert (await auth.login(user.username)).status_code == 200
        stored = await connection.fetchval("SELECT password_hash FROM auth.user_account WHERE id = $1", user.id)
    assert stored.startswith("$argon2id$v=19$m=64,t=1,p=1$")


async def test_registration_ignores_fields_that_would_grant_something(auth: Auth) -> None:
    body = {"username": "mallory", "email": "mallory@example.com", "password": PASSWORD}
    answer = await auth.call(
        "POST",
        "/api/v1/auth/register",
        json={**body, "roles": ["admin"], "role": "admin", "plan": "gold", "org_id": "x", "status": "active"},
    )
    assert answer.status_code == 201
    assert (answer.json()["roles"], answer.json()["plan"]) == (["user"], "default")


@pytest.mark.parametrize(
    "path", ["/api/v1/auth/register", LOGIN, "/api/v1/auth/refresh", "/api/v1/auth/logout", "/api/v1/keys"]
)
async def test_nothing_but_the_gateway_is_answered(auth: Auth, path: str) -> None:
    answer = await auth.http.post(path, json={"username": "ada.l", "password": PASSWORD, "name": "x"})
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_identity")


async def test_malformed_identities_and_strangers_to_the_organisation_are_refused(auth: Auth) -> None:
    user, other = await auth.user(), await auth.user()
    for identity in (
        Identity("user", user_id="junk", org_id="junk"),
        Identity("user", user_id=user.id, org_id=other.org_id, session_id=user.id),
        Identity("user", user_id=user.id, org_id=user.org_id),
        Identity("key", user_id=user.id, org_id=other.org_id, key_id=user.id, scopes=("*",)),
        Identity("service", service="chat"),
        Identity("anonymous"),
    ):
        answer = await auth.call_as(identity, "GET", "/api/v1/auth/me")
        assert answer.status_code == 401, identity
