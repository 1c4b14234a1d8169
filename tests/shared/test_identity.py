"""Identities are taken only from whom holds a key of the ring, and only for a minute."""

import base64
import json
from datetime import UTC, datetime

import pytest

from shared.clock import FixedClock
from shared.errors import PermissionDenied, Unauthenticated
from shared.identity import CLOCK_SKEW_S, LIFETIME_S, Identity, IdentityRing, parse_key_ring


def secret(fill: str) -> str:
    return base64.b64encode(fill.encode() * 32).decode()


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(datetime(2026, 1, 1, tzinfo=UTC))


@pytest.fixture
def ring(clock: FixedClock) -> IdentityRing:
    return IdentityRing(f"a:{secret('a')}", clock)


CALLER = Identity(
    kind="key",
    user_id="u1",
    org_id="o1",
    key_id="k1",
    plan="pro",
    roles=("user",),
    scopes=("chat", "billing:read"),
    models=("chat-mini",),
    tokens_per_minute=9_000,
    limit_id="l1",
)


def test_what_was_signed_is_what_is_verified(ring: IdentityRing) -> None:
    assert ring.verify(ring.sign(CALLER)) == CALLER


@pytest.mark.parametrize("models", [None, (), ("a", "b")])
def test_no_model_is_not_every_model(ring: IdentityRing, models: tuple[str, ...] | None) -> None:
    assert ring.verify(ring.sign(Identity(kind="key", models=models))).models == models


def test_a_hundred_long_model_names_fit(ring: IdentityRing) -> None:
    models = tuple(f"{i:03}{'m' * 125}" for i in range(100))
    assert ring.verify(ring.sign(Identity(kind="key", models=models))).models == models


def test_it_expires(ring: IdentityRing, clock: FixedClock) -> None:
    token = ring.sign(CALLER)
    clock.advance(LIFETIME_S + CLOCK_SKEW_S - 1)
    ring.verify(token)
    clock.advance(1)
    with pytest.raises(Unauthenticated):
        ring.verify(token)


def test_one_from_the_future_is_refused(ring: IdentityRing, clock: FixedClock) -> None:
    token = ring.sign(CALLER)
    clock.advance(-CLOCK_SKEW_S - 1)
    with pytest.raises(Unauthenticated):
        ring.verify(token)


def test_every_changed_byte_is_refused(ring: IdentityRing) -> None:
    token = ring.sign(CALLER)
    for i in range(len(token) - 1):  # the last character of base64 carries unused bits
        forged = token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :]
        with pytest.raises(Unauthenticated):
            ring.verify(forged)


@pytest.mark.parametrize("junk", [None, "", ".", "v1.a..", "v1.b.e30.AA", "v2.a.e30.AA", "v1.a.%.%", "x" * 40_000])
def test_junk_is_refused(ring: IdentityRing, junk: str | None) -> None:
    with pytest.raises(Unauthenticated):
        ring.verify(junk)


def test_keys_rotate_without_a_gap(clock: FixedClock, ring: IdentityRing) -> None:
    both = IdentityRing(f"b:{secret('b')},a:{secret('a')}", clock)
    assert both.verify(ring.sign(CALLER)) == CALLER
    with pytest.raises(Unauthenticated):
        ring.verify(both.sign(CALLER))


@pytest.mark.parametrize("setting", ["", "a", "a:!!!", f"a:{base64.b64encode(b'short').decode()}", f":{secret('a')}"])
def test_a_bad_ring_is_named_and_its_secret_is_not(setting: str) -> None:
    with pytest.raises(ValueError) as e:
        parse_key_ring(setting)
    assert setting.partition(":")[2] not in str(e.value) or not setting.partition(":")[2]


@pytest.mark.parametrize(
    ("scopes", "asked", "granted"),
    [
        (("*",), "chat", True),
        (("chat", "billing:write"), "billing:write", True),
        (("billing:read",), "billing:write", False),
        (("billing:*",), "billing:write", False),
        ((), "chat", False),
    ],
)
def test_scopes(scopes: tuple[str, ...], asked: str, granted: bool) -> None:
    assert Identity(kind="key", scopes=scopes).has_scope(asked) is granted


def test_a_key_has_its_owners_roles_only_with_the_admin_scope() -> None:
    with pytest.raises(PermissionDenied):
        Identity(kind="key", roles=("admin",), scopes=("chat",)).require_role("admin")
    Identity(kind="key", roles=("admin",), scopes=("admin",)).require_role("admin")
    with pytest.raises(Unauthenticated):
        Identity(kind="anonymous", roles=("admin",), scopes=("*",)).require_role("admin")


def test_the_claims_carry_no_empty_fields(ring: IdentityRing) -> None:
    claims = ring.sign(Identity(kind="anonymous")).split(".")[2]
    decoded = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    assert set(decoded) == {"kind", "plan", "iat", "exp"}
