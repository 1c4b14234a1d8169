"""Registration and recovery by e-mail, through a real SMTP server on loopback."""

import re
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest
import pytest_asyncio
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from pydantic import SecretStr, ValidationError

from deploy.local.ports import pick_port
from services.auth.repository.email import EmailRepository
from tests.auth.harness import PASSWORD, Auth, running, settings
from tests.conftest import Components

NEW_PASSWORD = "a longer horse, a better battery"
LINKS = "https://app.example.com/account"


class Postbox:
    """What the server took; `refusal` is what it answers instead."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []
        self.refusal = ""

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.refusal:
            return self.refusal
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        message = message_from_bytes(content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        assert message["to"] == envelope.rcpt_tos[0]
        self.messages.append(message)
        return "250 OK"

    def last(self) -> tuple[str, str, str]:
        """Subject, plain text, HTML of the last message."""
        message = self.messages[-1]
        text, html = message.get_body(("plain",)), message.get_body(("html",))
        assert text is not None
        assert html is not None
        return message["subject"], text.get_content(), html.get_content()

    def token(self) -> str:
        """The token in the last message: the same in both forms, and in a link behind the #."""
        _, text, html = self.last()
        [found] = re.findall(r"#token=(tg_email_[A-Za-z0-9_-]+)", text)
        assert f"#token={found}" in html
        token: str = found
        return token


@pytest.fixture(scope="module")
def server() -> Any:
    postbox = Postbox()
    controller = Controller(postbox, hostname="127.0.0.1", port=pick_port())
    controller.start()
    yield postbox, f"smtp://127.0.0.1:{controller.port}"
    controller.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mailing(owner_url: str, components: Components, server: Any) -> AsyncIterator[Auth]:
    changes = {
        "auth_registration": "verified",
        "auth_smtp_url": SecretStr(server[1]),
        "auth_email_link_url": LINKS,
        "auth_email_from": "Tollgate <no-reply@example.com>",
    }
    async with running(owner_url, components.redis_url, **changes) as app:
        yield app


@pytest.fixture
def postbox(server: Any) -> Postbox:
    found: Postbox = server[0]
    found.messages.clear()
    found.refusal = ""
    return found


async def deliver(auth: Auth) -> None:
    while await auth.services.email.send_due():
        pass


async def post(auth: Auth, path: str, **body: str) -> tuple[int, dict[str, Any]]:
    answer = await auth.call("POST", f"/api/v1/auth/{path}", json=body)
    return answer.status_code, answer.json() if answer.content else {}


async def verified_user(auth: Auth, postbox: Postbox) -> tuple[str, str]:
    """Name and address of a new user."""
    name = f"user-{secrets.token_hex(6)}"
    email = f"{name}@example.com"
    assert (await post(auth, "register", username=name, email=email, password=PASSWORD))[0] == 202
    await deliver(auth)
    assert (await post(auth, "verify-email", token=postbox.token(), password=PASSWORD))[0] == 201
    return name, email


async def test_an_account_is_made_when_its_address_is_proven(mailing: Auth, postbox: Postbox) -> None:
    name = f"user-{secrets.token_hex(6)}"
    body = {"username": name, "email": f"{name}@example.com", "password": PASSWORD}
    status, answer = await post(mailing, "register", **body)
    assert (status, answer) == (202, {"status": "message_sent"})
    assert (await mailing.login(name)).status_code == 401
    await deliver(mailing)
    subject, text, html = postbox.last()
    assert subject == "Confirm your registration"
    assert text.count("https://") == html.count("https://") == 1
    assert postbox.messages[-1]["from"] == "Tollgate <no-reply@example.com>"
    assert postbox.messages[-1]["auto-submitted"] == "auto-generated"

    token = postbox.token()
    status, user = await post(mailing, "verify-email", token=token, password=PASSWORD)
    assert (status, user["username"], user["email"]) == (201, name, body["email"])
    assert (await mailing.login(name)).status_code == 200
    again = await post(mailing, "verify-email", token=token, password=PASSWORD)
    assert again[1]["code"] == "invalid_email_token"


async def test_whoever_reads_the_mailbox_makes_no_account_with_somebody_elses_password(
    mailing: Auth, postbox: Postbox
) -> None:
    """A stranger registers with an address of yours, and waits for you to confirm it."""
    name = f"user-{secrets.token_hex(6)}"
    strangers = {"username": name, "email": f"{name}@example.com", "password": PASSWORD}
    assert (await post(mailing, "register", **strangers))[0] == 202
    await deliver(mailing)
    token = postbox.token()
    status, refused = await post(mailing, "verify-email", token=token, password="what the owner would type")
    assert (status, refused["code"], refused["param"]) == (403, "wrong_password", "password")
    assert (await mailing.login(name)).status_code == 401
    yours = {**strangers, "username": f"{name}.too", "password": NEW_PASSWORD}
    assert (await post(mailing, "register", **yours))[0] == 202
    await deliver(mailing)
    assert (await post(mailing, "verify-email", token=postbox.token(), password=NEW_PASSWORD))[0] == 201
    late = await post(mailing, "verify-email", token=token, password=PASSWORD)
    assert (late[0], late[1]["code"]) == (400, "invalid_email_token")
    assert (await mailing.login(name)).status_code == 401


async def test_who_resets_the_password_of_an_address_that_was_never_proven_keeps_none_of_its_keys(
    owner_url: str, components: Components, server: Any, postbox: Postbox
) -> None:
    """Where registration is open: a stranger's account with your address is yours when you read its mailbox."""
    smtp = {"auth_smtp_url": SecretStr(server[1]), "auth_email_link_url": LINKS}
    async with running(owner_url, components.redis_url, **smtp) as auth:
        stranger = await auth.user()
        key = await auth.key(stranger)
        for expected in ("revoked", "active"):
            assert (await post(auth, "password/forgot", email=stranger.email))[0] == 202
            await deliver(auth)
            assert (await post(auth, "password/reset", token=postbox.token(), new_password=NEW_PASSWORD))[0] == 204
            row = await auth.key_row(key["key"])
            assert row is not None
            assert row["status"] == expected
            tokens = (await auth.login(stranger.username, NEW_PASSWORD)).json()
            body = {"name": "mine"}
            key = (await auth.call("POST", "/api/v1/keys", token=tokens["access_token"], json=body)).json()


async def test_registration_does_not_tell_who_has_an_account(mailing: Auth, postbox: Postbox) -> None:
    """The same answer; the owner of the address is told, and nobody else."""
    _, email = await verified_user(mailing, postbox)
    taken = await post(mailing, "register", username="somebody.else", email=email.upper(), password=PASSWORD)
    free = await post(mailing, "register", username="somebody.new", email="x@example.com", password=PASSWORD)
    assert taken == free == (202, {"status": "message_sent"})
    async with mailing.connect() as connection:
        await connection.execute("DELETE FROM auth.email_outbox WHERE address = 'x@example.com'")
    await deliver(mailing)
    subject, text, _ = postbox.last()
    assert (subject, postbox.messages[-1]["to"]) == ("You have an account already", email)
    assert "tg_email_" not in text


async def test_a_forgotten_password_is_replaced_and_all_sessions_end(mailing: Auth, postbox: Postbox) -> None:
    name, email = await verified_user(mailing, postbox)
    session = (await mailing.login(name)).json()
    assert await post(mailing, "password/forgot", email=email) == (202, {"status": "message_sent"})
    await deliver(mailing)
    token = postbox.token()
    weak = await post(mailing, "password/reset", token=token, new_password="password")
    assert (weak[0], weak[1]["code"]) == (400, "weak_password")
    assert (await post(mailing, "password/reset", token=token, new_password=NEW_PASSWORD))[0] == 204
    again = await post(mailing, "password/reset", token=token, new_password=PASSWORD)
    assert (again[0], again[1]["code"]) == (400, "invalid_email_token")
    refreshed = await post(mailing, "refresh", refresh_token=session["refresh_token"])
    assert refreshed[0] == 401
    assert (await mailing.login(name)).status_code == 401
    assert (await mailing.login(name, NEW_PASSWORD)).status_code == 200


async def test_a_changed_password_ends_the_tokens_in_a_mailbox(mailing: Auth, postbox: Postbox) -> None:
    name, email = await verified_user(mailing, postbox)
    assert (await post(mailing, "password/forgot", email=email))[0] == 202
    await deliver(mailing)
    token = postbox.token()
    access = (await mailing.login(name)).json()["access_token"]
    body = {"old_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert (await mailing.call("POST", "/api/v1/auth/password", token=access, json=body)).status_code == 204
    late = await post(mailing, "password/reset", token=token, new_password=PASSWORD)
    assert (late[0], late[1]["code"]) == (400, "invalid_email_token")
    assert (await mailing.login(name, NEW_PASSWORD)).status_code == 200


async def test_asking_tells_nothing_and_strangers_get_no_message(mailing: Auth, postbox: Postbox) -> None:
    _, email = await verified_user(mailing, postbox)
    postbox.messages.clear()
    answers = [await post(mailing, "password/forgot", email=given) for given in (email, "nobody@example.com")]
    assert answers[0] == answers[1] == (202, {"status": "message_sent"})
    await deliver(mailing)
    assert [message["to"] for message in postbox.messages] == [email]


async def test_tokens_end_and_serve_one_purpose_only(mailing: Auth, postbox: Postbox) -> None:
    name, email = await verified_user(mailing, postbox)
    await post(mailing, "password/forgot", email=email)
    await deliver(mailing)
    reset = postbox.token()
    tokens = (await mailing.login(name)).json()
    path = "/api/v1/auth/verify-email/send"
    assert (await mailing.call("POST", path, token=tokens["access_token"])).status_code == 202
    await deliver(mailing)
    verify = postbox.token()
    refused = [
        await post(mailing, "verify-email", token=reset, password=PASSWORD),
        await post(mailing, "password/reset", token=verify, new_password=NEW_PASSWORD),
        await post(mailing, "verify-email", token="tg_email_" + "A" * 43, password=PASSWORD),
    ]
    assert {(status, body["code"]) for status, body in refused} == {(400, "invalid_email_token")}
    assert (await post(mailing, "verify-email", token=verify, password=NEW_PASSWORD))[0] == 403
    assert (await post(mailing, "verify-email", token=verify, password=PASSWORD))[0] == 204
    mailing.clock.advance(mailing.settings.auth_password_reset_ttl_s + 1)
    assert (await post(mailing, "password/reset", token=reset, new_password=NEW_PASSWORD))[0] == 400
    await mailing.services.email.prune()
    async with mailing.connect() as connection:
        over = "SELECT count(*) FROM auth.email_token WHERE expires_at <= $1"
        assert await connection.fetchval(over, mailing.clock.now()) == 0


async def test_no_token_and_no_password_is_at_rest(mailing: Auth, postbox: Postbox) -> None:
    _, email = await verified_user(mailing, postbox)
    await post(mailing, "password/forgot", email=email)
    await deliver(mailing)
    async with mailing.connect() as connection:
        for table in ("email_token", "email_outbox", "audit_log"):
            rows = await connection.fetch(f"SELECT t::text FROM auth.{table} t")
            assert not any(postbox.token() in row[0] or PASSWORD in row[0] for row in rows), table


async def test_a_server_that_fails_is_tried_again_and_one_that_refuses_is_not(mailing: Auth, postbox: Postbox) -> None:
    _, email = await verified_user(mailing, postbox)
    postbox.messages.clear()
    postbox.refusal = "451 later"
    await post(mailing, "password/forgot", email=email)
    await deliver(mailing)
    postbox.refusal = ""
    await deliver(mailing)
    assert postbox.messages == []
    mailing.clock.advance(mailing.settings.auth_email_retry_base_s + 1)
    await deliver(mailing)
    assert [message["to"] for message in postbox.messages] == [email]

    postbox.refusal = "550 no such mailbox"
    await post(mailing, "password/forgot", email=email)
    await deliver(mailing)
    postbox.refusal = ""
    mailing.clock.advance(3_600)
    await deliver(mailing)
    assert len(postbox.messages) == 1


async def test_what_a_dead_worker_had_taken_is_sent_by_another(mailing: Auth, postbox: Postbox) -> None:
    _, email = await verified_user(mailing, postbox)
    postbox.messages.clear()
    await post(mailing, "password/forgot", email=email)
    now = mailing.clock.now()
    async with mailing.services.email._sessions.begin() as session:
        assert await EmailRepository(session).claim(now, now + timedelta(seconds=30)) is not None
    await deliver(mailing)
    assert postbox.messages == []
    mailing.clock.advance(31)
    await deliver(mailing)
    assert len(postbox.messages) == 1


async def test_nobodys_mailbox_is_flooded(mailing: Auth, postbox: Postbox) -> None:
    _, email = await verified_user(mailing, postbox)
    most = mailing.settings.auth_email_per_address_hourly_max
    for address in [email, email.upper(), email.capitalize()] * most:  # one mailbox, however it is written
        assert (await post(mailing, "password/forgot", email=address))[0] == 202
    await deliver(mailing)
    assert len(postbox.messages) == most
    for bad in ("a@example.com\r\nBcc: b@example.com", "a@example.com,b@example.com"):
        assert (await post(mailing, "password/forgot", email=bad))[0] == 400


async def test_without_a_mail_server_it_is_said_so(auth: Auth) -> None:
    user = await auth.user()
    forgot = await post(auth, "password/forgot", email=user.email)
    assert (forgot[0], forgot[1]["code"]) == (409, "email_not_configured")
    sent = await auth.call("POST", "/api/v1/auth/verify-email/send", token=user.access_token)
    assert (sent.status_code, sent.json()["code"]) == (409, "email_not_configured")
    with pytest.raises(ValidationError, match="TOLLGATE_AUTH_SMTP_URL"):
        settings(auth.owner_url, "redis://x", auth_registration="verified")


async def test_closed_registration_is_closed(owner_url: str, components: Components) -> None:
    async with running(owner_url, components.redis_url, auth_registration="closed") as closed:
        refused = await closed.register()
        assert (refused.status_code, refused.json()["code"]) == (403, "registration_closed")
