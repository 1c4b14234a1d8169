"""API keys: junk is known before any lookup, and nothing at rest can be turned back into a key."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import apikeys

PEPPERS = ",".join(f"{v}:{base64.b64encode(bytes([v]) * 32).decode()}" for v in (2, 1))


def test_a_generated_key_is_well_formed_and_selectable_as_one_word() -> None:
    key = apikeys.generate()
    assert apikeys.is_well_formed(key)
    assert apikeys.PATTERN.fullmatch(key)
    assert key.replace("_", "").isalnum()


def test_keys_differ() -> None:
    assert len({apikeys.generate() for _ in range(1_000)}) == 1_000


def test_every_single_changed_character_is_noticed() -> None:
    key = apikeys.generate()
    for i in range(len(key)):
        changed = key[:i] + ("a" if key[i] != "a" else "b") + key[i + 1 :]
        assert not apikeys.is_well_formed(changed)


@given(st.text(max_size=80))
def test_any_text_is_judged_without_an_error(text: str) -> None:
    assert apikeys.is_well_formed(text) is False


def test_digests_depend_on_key_and_pepper_and_all_versions_are_candidates() -> None:
    peppers, key = apikeys.Peppers(PEPPERS), apikeys.generate()
    assert peppers.digest(key).pepper == 2
    assert [d.pepper for d in peppers.candidates(key)] == [2, 1]
    assert len({d.hex for d in peppers.candidates(key)} | {peppers.digest(apikeys.generate()).hex}) == 3
    assert key not in repr(peppers.candidates(key))


def test_what_is_shown_of_a_key_gives_nothing_away() -> None:
    key = apikeys.generate()
    assert apikeys.display_prefix(key) == key[:12]


def test_a_keys_version_lives_in_its_organisations_slot() -> None:
    assert apikeys.version_name("org", "key") == "{org}:keyver:key"


def test_pepper_versions_are_numbers() -> None:
    with pytest.raises(ValueError):
        apikeys.Peppers(f"x:{base64.b64encode(b'x' * 32).decode()}")
