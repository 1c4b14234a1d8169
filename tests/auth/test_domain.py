"""Rules that need no database."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.auth.domain import (
    LIMIT_MAX,
    LIMIT_NAMES,
    SCOPES,
    check_scopes,
    covers,
    merge_limits,
)
from services.auth.domain.fields import valid_email, valid_limit
from services.auth.errors import LimitAbovePlan, ScopeNotHeld

PLAN = {"minute": 60, "hour": 1000, "day": 10000, "concurrency": 16, "tokens_per_minute": 5000}
NO_TOKEN_LIMIT = {**PLAN, "tokens_per_minute": 0}
changes = st.fixed_dictionaries(
    {}, optional={name: st.none() | st.integers(name != "tokens_per_minute", LIMIT_MAX[name]) for name in LIMIT_NAMES}
)


def strength(name: str, value: int) -> float:
    """How much a limit admits: 0 tokens per minute is no limit."""
    return float("inf") if name == "tokens_per_minute" and value == 0 else value


@given(plan=st.sampled_from([PLAN, NO_TOKEN_LIMIT]), patches=st.lists(changes, max_size=5))
def test_no_sequence_of_a_users_own_changes_admits_more_than_the_plan(
    plan: dict[str, int], patches: list[dict[str, int | None]]
) -> None:
    own: dict[str, int] = {}
    for patch in patches:
        try:
            own = merge_limits(own, patch, plan)
        except LimitAbovePlan:
            continue
        for name in LIMIT_NAMES:
            assert strength(name, own.get(name, plan[name])) <= strength(name, plan[name])


@given(patch=changes)
def test_an_operators_change_is_taken_as_it_is(patch: dict[str, int | None]) -> None:
    merged = merge_limits({"minute": 7}, patch, PLAN, may_raise=True)
    assert merged == {k: v for k, v in ({"minute": 7} | patch).items() if v is not None}


@given(held=st.sets(st.sampled_from(SCOPES)), wanted=st.lists(st.sampled_from(SCOPES), min_size=1))
def test_granted_scopes_are_always_held(held: set[str], wanted: list[str]) -> None:
    if "*" in held or set(wanted) <= held:
        assert set(check_scopes(wanted, held)) == set(wanted)
    else:
        with pytest.raises(ScopeNotHeld):
            check_scopes(wanted, held)


def test_only_everything_covers_everything() -> None:
    assert not covers(set(SCOPES) - {"*"}, "*")
    assert covers({"*"}, "admin")


@pytest.mark.parametrize("address", ["a@localhost", "ops@tollgate.internal", "x@example.test", "ü@example.com"])
def test_private_and_international_addresses_are_fine(address: str) -> None:
    assert valid_email(address) == address


def test_the_domain_of_an_address_is_folded_and_its_local_part_is_kept() -> None:
    assert valid_email("Ada@Example.COM") == "Ada@example.com"


@pytest.mark.parametrize("address", ["", "a", "a@", "@b", "a b@example.com", "a@b..c", "a@example.com\n", "a\x00@b.c"])
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="valid e-mail"):
        valid_email(address)


@pytest.mark.parametrize("limit", ["minute", "minute=", "minute=0", "minute=1e3", "minute=9999999", "week=1", "=5"])
def test_a_limit_of_the_command_line_is_a_known_name_and_a_number_within_its_bound(limit: str) -> None:
    assert valid_limit("minute=600") == ("minute", 600)
    with pytest.raises(ValueError, match="such as minute=600"):
        valid_limit(limit)
