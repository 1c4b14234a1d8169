"""Credits for money."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, Field

from services.billing.repository.topups import TopUpRow
from services.billing.routes.dependencies import CustomerAuthor, OperatorAuthor, OwnWallet, TopUpService
from services.billing.routes.fields import PAGE_DEFAULT, Body, PageSize, PositiveCreditsIn, Reason
from shared.money import format_credits
from shared.web import AnyCaller

router = APIRouter(tags=["billing"])

TOPUPS = "/api/v1/billing/topups"


class TopUpBody(Body):
    credits: PositiveCreditsIn
    provider: Literal["stripe"] = "stripe"


class ManualTopUpBody(Body):
    """Money that came some other way."""

    org_id: UUID
    credits: PositiveCreditsIn
    reference: Annotated[Reason, Field(description="Of the bank transfer, say: each is credited once.")]


class TopUpAnswer(BaseModel):
    """`money` in the smallest unit of the currency."""

    id: UUID
    org_id: UUID
    provider: str
    status: Literal["pending", "paid", "failed"]
    credits: str
    currency: str
    money: int
    checkout_url: str | None = Field(description="Where it is paid.")
    failure: str | None
    created_at: datetime
    updated_at: datetime


class TopUpsAnswer(BaseModel):
    data: list[TopUpAnswer]
    next_cursor: UUID | None


@router.post(TOPUPS, status_code=201)
async def start(body: TopUpBody, service: TopUpService, author: CustomerAuthor) -> TopUpAnswer:
    """Order credits and get an address to pay at. They are there when the provider says that they are paid."""
    return _answer(await service.start(author, author.tenant, body.credits, provider=body.provider))


@router.get(TOPUPS)
async def topups(
    service: TopUpService,
    org_id: OwnWallet,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: PageSize = PAGE_DEFAULT,
) -> TopUpsAnswer:
    """Newest first."""
    rows, following = await service.page(org_id, before=cursor, limit=limit)
    return TopUpsAnswer(data=[_answer(row) for row in rows], next_cursor=following)


@router.get(TOPUPS + "/{topup_id}")
async def topup(topup_id: UUID, service: TopUpService, org_id: OwnWallet) -> TopUpAnswer:
    """How it stands."""
    return _answer(await service.get(org_id, topup_id))


@router.post("/api/v1/admin/billing/topups", status_code=201, tags=["admin"])
async def record(body: ManualTopUpBody, service: TopUpService, author: OperatorAuthor) -> TopUpAnswer:
    """Credit money that an operator has received; the same reference is never credited twice."""
    return _answer(await service.start(author, body.org_id, body.credits, provider="manual", reference=body.reference))


@router.post("/api/v1/billing/payments/stripe/webhook", status_code=204)
async def stripe_webhook(
    request: Request,
    service: TopUpService,
    _: AnyCaller,
    signature: Annotated[str, Header(alias="Stripe-Signature", max_length=1_000)] = "",
) -> None:
    """For Stripe: what became of a payment. Its signature is its credential."""
    await service.receive("stripe", await request.body(), signature)


def _answer(row: TopUpRow) -> TopUpAnswer:
    return TopUpAnswer.model_validate(
        {
            "id": row.id,
            "org_id": row.wallet_id,
            "provider": row.provider,
            "status": row.status,
            "credits": format_credits(row.amount),
            "currency": row.currency,
            "money": row.money_minor,
            "checkout_url": row.checkout_url if row.status == "pending" else None,
            "failure": row.failure,
            "created_at": row.created_at,
            "updated_at": row.updated_at,
        }
    )
