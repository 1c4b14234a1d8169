"""UUIDv7 as RFC 9562 has it, and request ids that cannot carry anything harmful."""

import uuid

import pytest

from shared import ids


def test_uuid7_has_version_variant_and_time() -> None:
    made = ids.uuid7(1_700_000_000_123)
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 == 1_700_000_000_123


def test_a_service_accounts_id_is_marked_and_sorts_among_the_others() -> None:
    made = ids.service_account_id(1_700_000_000_123)
    assert (made.version, made.variant) == (8, uuid.RFC_4122)
    assert ids.uuid7(1_700_000_000_122) < made < ids.uuid7(1_700_000_000_124)
    assert ids.is_service_account(made)
    assert not ids.is_service_account(ids.uuid7())
    assert not ids.is_service_account(uuid.uuid4())


def test_later_ids_sort_later() -> None:
    assert ids.uuid7(1) < ids.uuid7(2)


def test_ids_of_one_millisecond_differ() -> None:
    assert len({ids.uuid7(1) for _ in range(10_000)}) == 10_000


@pytest.mark.parametrize("offered", ["abcdefgh", "req_0123-4567.89", "a" * 64])
def test_a_harmless_request_id_is_kept(offered: str) -> None:
    assert ids.accepted_request_id(offered) == offered


@pytest.mark.parametrize(
    "offered", [None, "", "short", "a" * 65, "a b c d e f", "evil\r\nx: y", "evilevil\n", "ünïcödé_"]
)
def test_any_other_is_replaced(offered: str | None) -> None:
    assert ids.accepted_request_id(offered).startswith("req_")
