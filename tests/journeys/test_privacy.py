"""What customers say, and their secrets, are in no log of any process."""

import secrets

from tests.journeys.conftest import until
from tests.journeys.people import User
from tests.running_stack import RunningStack


def test_no_log_holds_a_prompt_a_key_a_token_or_a_password(stack: RunningStack, user: User) -> None:
    marker = f"marker-{secrets.token_hex(8)}"
    prompt = [{"role": "user", "content": f"Please repeat: {marker}"}]
    answered = user.ask(messages=prompt, max_tokens=5)
    assert answered.status_code == 200
    assert user.ask(messages=prompt, modalities=["audio"]).status_code == 400
    assert user.ask(messages=[{"role": marker, "content": marker}]).status_code == 400
    assert user.ask(messages=prompt, model="none").status_code == 404
    malformed = user.key[:-1] + ("0" if user.key[-1] != "0" else "1")
    assert user.api.get("/v1/models", headers={"Authorization": f"Bearer {malformed}"}).status_code == 401
    request_id = answered.headers["x-request-id"]
    until(lambda: request_id in stack.log("chat", 1_000), what="the request is in chat's log")
    token = user.session.headers["authorization"].removeprefix("Bearer ")
    for log in stack.stack.layout.log.iterdir():
        text = log.read_text(errors="replace")
        for secret in (marker, user.key, malformed, token, user.password):
            assert secret not in text, f"{log.name} holds what nobody should read"
