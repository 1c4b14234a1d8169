"""What routes ask for: the services, whose wallet it is, and who writes under which idempotency key."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Request

from services.billing.errors import IdempotencyKeyRequired
from services.billing.service import Author, Billing, Prices
from shared.errors import PermissionDenied
from shared.identity import Identity
from shared.web import Caller

IDEMPOTENCY_KEY_CHARS_MAX = 255
READ_SCOPE = "billing:read"
ADMIN_SCOPE = "admin"
ADMIN_ROLES = ("operator", "admin")


def billing(request: Request) -> Billing:
    found: Billing = request.app.state.billing
    return found


def prices(request: Request) -> Prices:
    found: Prices = request.app.state.prices
    return found


def reader(identity: Caller) -> Identity:
    """Who may read their organisation's wallet."""
    identity.require_scope(READ_SCOPE)
    return identity


def own_wallet(identity: Annotated[Identity, Depends(reader)]) -> UUID:
    """The caller's organisation: no route takes another one's id from a customer."""
    return organisation(identity)


def person(identity: Annotated[Identity, Depends(reader)]) -> UUID | None:
    """The user who asks, or on whose behalf a key does."""
    try:
        return UUID(identity.user_id)
    except ValueError:
        return None


def author(
    identity: Caller,
    idempotency_key: Annotated[
        str | None, Header(alias="Idempotency-Key", description="Required; new for each request.")
    ] = None,
) -> Author:
    """An operator who writes. Raises IdempotencyKeyRequired without a usable key."""
    identity.require_role(*ADMIN_ROLES)
    identity.require_scope(ADMIN_SCOPE)
    key = idempotency_key or ""
    if not 1 <= len(key) <= IDEMPOTENCY_KEY_CHARS_MAX or not (key.isascii() and key.isprintable()):
        raise IdempotencyKeyRequired()
    actor = f"key:{identity.key_id}" if identity.key_id else f"user:{identity.user_id}"
    return Author(organisation(identity), actor, key)


def organisation(identity: Identity) -> UUID:
    try:
        return UUID(identity.org_id)
    except ValueError:
        raise PermissionDenied("This needs a caller that belongs to an organisation.") from None


BillingService = Annotated[Billing, Depends(billing)]
PriceService = Annotated[Prices, Depends(prices)]
Reader = Annotated[Identity, Depends(reader)]
OwnWallet = Annotated[UUID, Depends(own_wallet)]
Person = Annotated[UUID | None, Depends(person)]
CurrentAuthor = Annotated[Author, Depends(author)]
