"""Sign-in through OpenID providers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from services.auth.domain.fields import USERNAME_CHARS_MAX, USERNAME_CHARS_MIN

RETURN_TO = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@%-][A-Za-z0-9._~!$&'()*+,;=:@%/?#-]*)?")


class OidcProvider(BaseModel):
    """One provider, as configured. `link_by_email`: a verified address that it names is enough to sign in to the
    account of that address; say so only of a provider that speaks for every address. `create_users`: whether people
    who have no account get one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[a-z0-9-]{1,32}$")
    issuer: str = Field(pattern=r"^https?://[^?#]+$")
    client_id: str = Field(min_length=1)
    client_secret: SecretStr
    scope: str = "openid email profile"
    link_by_email: bool = False
    create_users: bool = True


@dataclass(frozen=True, slots=True)
class OidcFlow:
    """A sign-in that was begun: what must come back, and where the person goes then ("" for no page: tokens)."""

    provider: str
    nonce: str
    verifier: str
    return_to: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class ExternalPerson:
    """Whom a provider vouches for."""

    issuer: str
    subject: str
    email: str
    email_verified: bool
    username: str


def is_own_page(return_to: str) -> bool:
    """Whether a place to return to is a path of ours: `//host` and `/\\host` lead elsewhere."""
    return RETURN_TO.fullmatch(return_to) is not None


def username_from(offered: str) -> str:
    """A user name that is like what a provider calls somebody."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", offered.partition("@")[0]).strip("-")[: USERNAME_CHARS_MAX - 8]
    return cleaned if len(cleaned) >= USERNAME_CHARS_MIN else f"user-{cleaned}".rstrip("-")
