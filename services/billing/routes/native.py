"""The plain calls of Tollgate's predecessor: balance, add, charge, refund, transactions, summary.

The same wallets and the same ledger as under /api/v1/billing. Answers carry `success`; amounts are decimal strings.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.billing.domain import CURRENCY, WalletView
from services.billing.repository.history import TransactionFilter
from services.billing.routes.dependencies import (
    CustomerAuthor,
    HistoryService,
    OperatorAuthor,
    OwnWallet,
    Person,
    WalletService,
)
from services.billing.routes.fields import PAGE_DEFAULT, Body, PageSize, PositiveCreditsIn, Reason
from services.billing.routes.transactions import Cursor, transactions_page
from shared.money import format_credits

router = APIRouter(prefix="/billing", tags=["native"])

GIVING = frozenset(("grant", "refund"))


class AddBody(Body):
    """To the caller's own organisation, unless another one is named."""

    amount: PositiveCreditsIn
    description: Reason
    org_id: UUID | None = None


class ChargeBody(Body):
    amount: PositiveCreditsIn
    description: Reason


class PlainRefundBody(Body):
    """`charge_id` is a charge or a request's hold; without an amount, all that is left of it is given back."""

    charge_id: UUID
    amount: PositiveCreditsIn | None = None
    description: Reason
    org_id: UUID | None = None


class PlainBalanceAnswer(BaseModel):
    success: bool = True
    org_id: UUID
    currency: str = CURRENCY
    balance: str
    available: str = Field(description="What is not reserved by requests in flight.")


class PlainChangeAnswer(BaseModel):
    success: bool = True
    id: UUID = Field(description="Of the grant or the charge; of a refund, what it gives back.")
    amount: str
    remaining_credits: str


class PlainTransactionAnswer(BaseModel):
    id: UUID
    type: Literal["add", "charge"]
    kind: str
    amount: str = Field(description="Signed.")
    balance_after: str
    model: str | None
    created_at: datetime


class PlainTransactionsAnswer(BaseModel):
    success: bool = True
    transactions: list[PlainTransactionAnswer]
    next_cursor: str | None


class ModelAnswer(BaseModel):
    model: str
    requests: int
    credits: str


class PlainSummaryAnswer(PlainBalanceAnswer):
    """`total_charged` is less refunds; `models` of this month."""

    total_added: str
    total_charged: str
    models: list[ModelAnswer]


@router.get("/balance")
async def balance(service: WalletService, org_id: OwnWallet, user_id: Person) -> PlainBalanceAnswer:
    """What the caller's organisation has left."""
    return PlainBalanceAnswer(**_balance(await service.wallet(org_id, user_id)))


@router.post("/add", status_code=201)
async def add(body: AddBody, service: WalletService, author: OperatorAuthor) -> PlainChangeAnswer:
    """For operators: put credits into a wallet."""
    org_id = body.org_id or author.tenant
    granted = await service.grant(author, org_id, body.amount, reason=body.description, expires_at=None)
    return _change(granted.grant_id, granted.amount, granted.available)


@router.post("/charge", status_code=201)
async def charge(body: ChargeBody, service: WalletService, author: CustomerAuthor) -> PlainChangeAnswer:
    """Take credits from the caller's own wallet, whole or not at all: 402 when they are not there."""
    charged = await service.charge(author, author.tenant, body.amount, reason=body.description)
    return _change(charged.charge_id, charged.amount, charged.available)


@router.post("/refund", status_code=201)
async def refund(body: PlainRefundBody, service: WalletService, author: OperatorAuthor) -> PlainChangeAnswer:
    """For operators: give back what a charge or a request took."""
    org_id = body.org_id or author.tenant
    refunded = await service.refund(author, org_id, body.charge_id, body.amount, reason=body.description)
    return _change(body.charge_id, refunded.amount, refunded.available)


@router.get("/transactions")
async def transactions(
    history: HistoryService, org_id: OwnWallet, cursor: Cursor = None, limit: PageSize = PAGE_DEFAULT
) -> PlainTransactionsAnswer:
    """Newest first."""
    page = await transactions_page(history, org_id, TransactionFilter(), None, None, cursor, limit)
    return PlainTransactionsAnswer(
        transactions=[
            PlainTransactionAnswer(
                id=row.id,
                type="add" if row.kind in GIVING else "charge",
                kind=row.kind,
                amount=row.amount,
                balance_after=row.balance_after,
                model=row.model,
                created_at=row.created_at,
            )
            for row in page.data
        ],
        next_cursor=page.next_cursor,
    )


@router.get("/summary")
async def summary(
    service: WalletService, history: HistoryService, org_id: OwnWallet, user_id: Person
) -> PlainSummaryAnswer:
    """What came in, what was spent, and on which models."""
    view = await service.wallet(org_id, user_id)
    sums, _ = await history.usage_sums(org_id, since=None, until=None, groups=("model",))
    return PlainSummaryAnswer(
        **_balance(view),
        total_added=format_credits(view.granted),
        total_charged=format_credits(view.spent),
        models=[
            ModelAnswer(model=row.model or "", requests=row.requests, credits=format_credits(row.cost)) for row in sums
        ],
    )


def _balance(view: WalletView) -> dict[str, object]:
    return {
        "org_id": view.org_id,
        "balance": format_credits(view.balance),
        "available": format_credits(view.available),
    }


def _change(changed: UUID, amount: int, remaining: int) -> PlainChangeAnswer:
    return PlainChangeAnswer(id=changed, amount=format_credits(amount), remaining_credits=format_credits(remaining))
