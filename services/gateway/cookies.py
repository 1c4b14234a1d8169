"""Browsers show their access token in a cookie, which is sent whether they mean to or not.

So whatever changes something must carry what only a page of ours can read: the value of the cookie `csrf` in the
header x-csrf-token. Its digest is in the signed token, so that a planted cookie proves nothing.
"""

from __future__ import annotations

import hmac
from typing import NamedTuple

from services.gateway.tokens import AccessToken
from shared.access_tokens import cookie_names, csrf_digest
from shared.errors import PermissionDenied, Unauthenticated

SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
COOKIE_CHARS_MAX = 8_192


class Shown(NamedTuple):
    """What a request shows: a credential, and for one from a cookie what came in x-csrf-token."""

    credential: str | None
    csrf_token: str | None = None


class BrowserCookies:
    """`public_url` decides the cookie's name: over HTTPS only one that no other host can set is believed."""

    def __init__(self, public_url: str) -> None:
        self._name = cookie_names(public_url).access

    def shown(self, cookie: str | None, csrf_token: str | None) -> Shown:
        """The access token of a Cookie header, if it has one. Other cookies may hold what they like."""
        if not cookie or self._name not in cookie or len(cookie) > COOKIE_CHARS_MAX:
            return Shown(None)
        for pair in cookie.split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self._name and value.count(".") == 2:
                return Shown(value, csrf_token or "")
        return Shown(None)


def check(token: AccessToken, method: str, csrf_token: str) -> None:
    """Raise Unauthenticated for a token that was not made for cookies, PermissionDenied for a forged request."""
    if not token.csrf:
        raise Unauthenticated()
    if method not in SAFE_METHODS and not hmac.compare_digest(token.csrf, csrf_digest(csrf_token)):
        raise PermissionDenied("Send the value of the csrf cookie as x-csrf-token.", code="csrf_failed")
