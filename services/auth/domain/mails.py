"""E-mails: what is sent for which purpose, in plain text and in HTML that says the same.

Tokens stand in a link behind `#`, so that they reach no server's log, or by themselves where no page is set up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from html import escape


class Purpose(StrEnum):
    REGISTER = "register"
    VERIFY = "verify"
    RESET = "reset"


ISSUED_BY, OPERATOR = "issued_by", "operator"
"""In the payload of a token that an operator hands over: it proves no mailbox."""


@dataclass(frozen=True, slots=True)
class Mail:
    """A message as it goes out. The bodies hold secrets, which `repr` does not show."""

    address: str
    subject: str
    text: str = field(repr=False)
    html: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Order:
    """A mail that is to be sent: the purpose, to whom, and what the purpose needs. There is no secret in it."""

    purpose: Purpose
    address: str
    payload: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class EmailToken:
    """What a token that was sent stands for."""

    purpose: Purpose
    address: str
    user_id: str | None
    payload: Mapping[str, str] = field(repr=False)
    expires_at: datetime


_SUBJECTS = {
    Purpose.REGISTER: "Confirm your registration",
    Purpose.VERIFY: "Confirm your e-mail address",
    Purpose.RESET: "Reset your password",
}
_ASKS = {
    Purpose.REGISTER: "Somebody, hopefully you, registered with this address. Confirm it, with your password.",
    Purpose.VERIFY: "Confirm that this address is yours, with your password.",
    Purpose.RESET: "Somebody, hopefully you, asked for a new password. Choose one here. All sessions will end.",
}
_PAGES = {Purpose.REGISTER: "verify-email", Purpose.VERIFY: "verify-email", Purpose.RESET: "reset-password"}
_IGNORE = "If it was not you, ignore this message: nothing happens without it."
_TAKEN = "Somebody tried to register with this address, which has an account already. If it was you, sign in, or reset \
your password. If it was not, ignore this message."


def token_mail(purpose: Purpose, address: str, token: str, *, link_url: str, lifetime_s: int) -> Mail:
    """The mail with a token; with `link_url` as a link to a page there."""
    valid = f"It works once, for {lifetime_s // 60} minutes."
    paragraphs = [_ASKS[purpose]]
    if link_url:
        link = f"{link_url.rstrip('/')}/{_PAGES[purpose]}#token={token}"
        text = "\n\n".join([*paragraphs, link, valid, _IGNORE])
        middle = f'<p><a href="{escape(link)}">{escape(_SUBJECTS[purpose])}</a></p>'
    else:
        text = "\n\n".join([*paragraphs, f"Your code: {token}", valid, _IGNORE])
        middle = f"<p>Your code: <code>{escape(token)}</code></p>"
    html = _html(_SUBJECTS[purpose], f"<p>{escape(paragraphs[0])}</p>{middle}<p>{escape(valid)}</p>")
    return Mail(address, _SUBJECTS[purpose], text + "\n", html)


def taken_mail(address: str) -> Mail:
    """To somebody whose address was given at a registration though it has an account."""
    subject = "You have an account already"
    return Mail(address, subject, _TAKEN + "\n", _html(subject, f"<p>{escape(_TAKEN)}</p>", ignore=False))


def _html(title: str, body: str, *, ignore: bool = True) -> str:
    tail = f"<p>{escape(_IGNORE)}</p>" if ignore else ""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{tail}</body></html>'
