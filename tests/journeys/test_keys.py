"""A revoked key fails on its next request; a rotated one works as long as its grace says."""

import openai
import pytest

from tests.journeys.people import User


@pytest.mark.parametrize("way", ["DELETE /api/v1/keys/{}", "POST /api/v1/keys/{}/revoke"])
def test_a_revoked_key_fails_on_its_next_request(user: User, way: str) -> None:
    sdk = user.openai()
    assert sdk.models.list().data
    method, path = way.format(user.key_id).split()
    assert user.session.request(method, path).is_success
    with pytest.raises(openai.AuthenticationError):
        sdk.models.list()
    assert user.ask().status_code == 401


def test_a_key_that_was_just_made_works_at_once(user: User) -> None:
    for _ in range(5):
        assert user.openai(api_key=user.new_key()["key"]).models.list().data


def test_the_secret_is_shown_once(user: User) -> None:
    made = user.new_key()
    shown = user.session.get("/api/v1/keys").text + user.session.get(f"/api/v1/keys/{made['id']}").text
    assert made["key"] not in shown
    assert made["prefix"] in shown


def test_both_secrets_of_a_rotated_key_work_during_its_grace(user: User) -> None:
    rotated = user.session.post(f"/api/v1/keys/{user.key_id}/rotate", json={"grace_s": 60})
    assert rotated.status_code == 201
    assert user.openai().models.list().data
    assert user.openai(api_key=rotated.json()["key"]).models.list().data
    assert user.session.post(f"/api/v1/keys/{rotated.json()['id']}/rotate", json={"grace_s": 0}).status_code == 201
    with pytest.raises(openai.AuthenticationError):
        user.openai(api_key=rotated.json()["key"]).models.list()
