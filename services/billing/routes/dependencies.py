"""What routes ask for: the services, whose wallet it is, and who writes under which idempotency key."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Request

from services.billing.errors import IdempotencyKeyRequired
from services.billing.service import Alerts, Author, Budgets, History, Invoices, Prices, TopUps, Wallets, Webhooks
from shared.errors import PermissionDenied
from shared.identity import Identity
from shared.ids import is_service_account
from shared.web import Caller

IDEMPOTENCY_KEY_CHARS_MAX = 255
READ_SCOPE = "billing:read"
WRITE_SCOPE = "billing:write"
ADMIN_SCOPE = "admin"
ADMIN_ROLES = ("operator", "admin")

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", description="Required; new for each request.")]


async def wallets(request: Request) -> Wallets:
    found: Wallets = request.app.state.wallets
    return found


async def history(request: Request) -> History:
    found: History = request.app.state.history
    return found


async def budgets(request: Request) -> Budgets:
    found: Budgets = request.app.state.budgets
    return found


async def topups(request: Request) -> TopUps:
    found: TopUps = request.app.state.topups
    return found


async def webhooks(request: Request) -> Webhooks:
    found: Webhooks = request.app.state.webhooks
    return found


async def alerts(request: Request) -> Alerts:
    found: Alerts = request.app.state.alerts
    return found


async def invoices(request: Request) -> Invoices:
    found: Invoices = request.app.state.invoices
    return found


async def prices(request: Request) -> Prices:
    found: Prices = request.app.state.prices
    return found


async def reader(identity: Caller) -> Identity:
    """Who may read their organisation's wallet."""
    identity.require_scope(READ_SCOPE)
    return identity


async def writer(identity: Caller) -> Identity:
    """Who may change what belongs to their organisation's wallet."""
    identity.require_scope(WRITE_SCOPE)
    return identity


async def operator(identity: Caller) -> Identity:
    """Who may look at and change everybody's."""
    identity.require_role(*ADMIN_ROLES)
    identity.require_scope(ADMIN_SCOPE)
    return identity


async def own_wallet(identity: Annotated[Identity, Depends(reader)]) -> UUID:
    """The caller's organisation: no route takes another one's id from a customer."""
    return organisation(identity)


async def person(identity: Annotated[Identity, Depends(reader)]) -> UUID | None:
    """The person who asks, or on whose behalf a key does; None for a service account's."""
    user_id = _id(identity.user_id)
    return None if user_id is None or is_service_account(user_id) else user_id


async def customer_author(
    identity: Annotated[Identity, Depends(writer)], idempotency_key: IdempotencyKey = None
) -> Author:
    """A customer who writes, for the wallet of their own organisation. Raises IdempotencyKeyRequired."""
    return _author(identity, idempotency_key)


async def operator_author(
    identity: Annotated[Identity, Depends(operator)], idempotency_key: IdempotencyKey = None
) -> Author:
    """An operator who writes. Raises IdempotencyKeyRequired."""
    return _author(identity, idempotency_key)


def organisation(identity: Identity) -> UUID:
    try:
        return UUID(identity.org_id)
    except ValueError:
        raise PermissionDenied("This needs a caller that belongs to an organisation.") from None


def _author(identity: Identity, idempotency_key: str | None) -> Author:
    key = idempotency_key or ""
    if not 1 <= len(key) <= IDEMPOTENCY_KEY_CHARS_MAX or not (key.isascii() and key.isprintable()):
        raise IdempotencyKeyRequired()
    return Author(organisation(identity), _id(identity.user_id), _id(identity.key_id), key)


def _id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


WalletService = Annotated[Wallets, Depends(wallets)]
HistoryService = Annotated[History, Depends(history)]
BudgetService = Annotated[Budgets, Depends(budgets)]
TopUpService = Annotated[TopUps, Depends(topups)]
WebhookService = Annotated[Webhooks, Depends(webhooks)]
AlertService = Annotated[Alerts, Depends(alerts)]
InvoiceService = Annotated[Invoices, Depends(invoices)]
PriceService = Annotated[Prices, Depends(prices)]
Reader = Annotated[Identity, Depends(reader)]
Writer = Annotated[Identity, Depends(writer)]
Operator = Annotated[Identity, Depends(operator)]
OwnWallet = Annotated[UUID, Depends(own_wallet)]
Person = Annotated[UUID | None, Depends(person)]
CustomerAuthor = Annotated[Author, Depends(customer_author)]
OperatorAuthor = Annotated[Author, Depends(operator_author)]
