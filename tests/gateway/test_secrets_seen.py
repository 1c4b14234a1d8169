"""What the stack's fixture finds in logs, and what it leaves alone."""

from pathlib import Path

import httpx
import pytest

from tests.secrets_seen import SecretsSeen

A_WORD = "correct" + "horse" + "battery"  # in none of our sources


@pytest.fixture
def seen() -> SecretsSeen:
    """After one exchange with secrets in every place."""
    headers = {"authorization": "Bearer shown-in-a-header", "cookie": "other=1; tg_refresh=shown-in-a-cookie"}
    body = {
        "username": "somebody-or-other",
        "password": "a-long-password",
        "old_password": A_WORD,
        "new_password": "triton_guard",
        "all": [{"client_secret": "in-a-list-in-it"}],
    }
    request = httpx.Request("POST", "http://x/", json=body, headers=headers)
    set_cookie = [("set-cookie", "tg_access=set-in-an-answer; Path=/; HttpOnly")]
    answer = {"access_token": "given-in-an-answer", "token_type": "not-one-itself"}
    made = SecretsSeen()
    made.look_at(request, httpx.Response(200, json=answer, headers=set_cookie, request=request))
    return made


@pytest.mark.parametrize(
    "line",
    [
        "shown-in-a-header",
        "shown-in-a-cookie",
        "a-long-password",
        A_WORD,
        "in-a-list-in-it",
        "set-in-an-answer",
        "given-in-an-answer",
        "tg_live_" + "k" * 48,
        "whsec_" + "s" * 32,
        "postgresql://tollgate:0123456789@127.0.0.1/x",
    ],
)
def test_a_secret_in_a_log_is_found_and_not_repeated(seen: SecretsSeen, tmp_path: Path, line: str) -> None:
    (tmp_path / "auth.log").write_text(f'{{"event": "request", "detail": "{line}"}}\n')
    [found] = seen.in_logs(tmp_path)
    assert found.startswith("auth.log: ")
    assert line not in found


def test_what_is_no_secret_is_left_alone(seen: SecretsSeen, tmp_path: Path) -> None:
    (tmp_path / "auth.log").write_text(
        "triton_guard somebody-or-other not-one-itself tg_live_abcd http://127.0.0.1:20000/x?to=a@example.com postgresql://t:***@h/x\n"
    )
    assert seen.in_logs(tmp_path) == []
