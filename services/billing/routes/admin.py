"""For operators: anybody's wallet, and the list of prices. Every write wants an Idempotency-Key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from services.billing.domain import DEFAULT_CLASS, PriceTerms
from services.billing.routes.dependencies import (
    HistoryService,
    OperatorAuthor,
    PriceService,
    WalletService,
    operator,
)
from services.billing.routes.fields import (
    PAGE_DEFAULT,
    Body,
    CreditsIn,
    CustomerClass,
    Model,
    PageSize,
    PositiveCreditsIn,
    Reason,
    Timestamp,
)
from services.billing.routes.prices import PriceAnswer, price_answer
from services.billing.routes.transactions import (
    Cursor,
    Since,
    TransactionsAnswer,
    Until,
    Wanted,
    transactions_page,
)
from services.billing.routes.wallet import BalanceAnswer, WalletAnswer, balance_answer, wallet_answer
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/admin/billing", tags=["admin"])
Operators = Depends(operator)


class GrantBody(Body):
    org_id: UUID
    credits: PositiveCreditsIn
    reason: Reason
    expires_at: Timestamp | None = None


class GrantedAnswer(BaseModel):
    """`available` and `receivable` are the wallet's after the grant."""

    grant_id: UUID
    org_id: UUID
    credits: str
    available: str
    receivable: str


class RefundBody(Body):
    """`source_id` is a request's hold or a charge; `credits` left out is all that is left of it."""

    source_id: UUID
    credits: PositiveCreditsIn | None = None
    reason: Reason


class RefundAnswer(BaseModel):
    """`refundable` is what is left of what was taken; `available` and `receivable` are the wallet's afterwards."""

    org_id: UUID
    source_id: UUID
    credits: str
    refundable: str
    available: str
    receivable: str


class FreezeBody(Body):
    frozen: bool
    reason: Reason


class FreezeAnswer(BaseModel):
    org_id: UUID
    frozen: bool


class AuditEntryAnswer(BaseModel):
    """`frozen` is of a `freeze`, `credits` of the others."""

    id: UUID
    kind: str = Field(description="`charge`, `refund`, `take_back` or `freeze`.")
    credits: str | None
    frozen: bool | None
    reason: str
    actor: str
    created_at: datetime


class AuditAnswer(BaseModel):
    data: list[AuditEntryAnswer]
    next_cursor: UUID | None


class PriceBody(Body):
    """Decimal credits: per request, and per million tokens of a class."""

    model: Model
    customer_class: CustomerClass = DEFAULT_CLASS
    per_request: CreditsIn = 0
    input: CreditsIn
    cached_input: CreditsIn
    output: CreditsIn
    effective_from: Timestamp | None = Field(None, description="Now, when left out. Never in the past.")


class PriceVersionAnswer(PriceAnswer):
    valid_until: datetime | None


class PriceVersionsAnswer(BaseModel):
    data: list[PriceVersionAnswer]
    next_cursor: UUID | None


@router.get("/wallets/{org_id}", dependencies=[Operators])
async def wallet(org_id: UUID, service: WalletService) -> WalletAnswer:
    """An organisation's wallet now. Looking does not open it."""
    return wallet_answer(await service.existing(org_id))


@router.get("/wallets/{org_id}/balance", dependencies=[Operators])
async def balance(
    org_id: UUID, service: WalletService, at: Annotated[Timestamp | None, Query()] = None
) -> BalanceAnswer:
    """Its balance as of a time, now if none is given."""
    return balance_answer(org_id, await service.balance_at(org_id, at))


@router.get("/wallets/{org_id}/transactions", dependencies=[Operators])
async def transactions(
    org_id: UUID,
    history: HistoryService,
    filters: Wanted,
    since: Since = None,
    until: Until = None,
    cursor: Cursor = None,
    limit: PageSize = PAGE_DEFAULT,
) -> TransactionsAnswer:
    """Its history, newest first."""
    return await transactions_page(history, org_id, filters, since, until, cursor, limit)


@router.get("/wallets/{org_id}/audit", dependencies=[Operators])
async def audit(
    org_id: UUID,
    history: HistoryService,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: PageSize = PAGE_DEFAULT,
) -> AuditAnswer:
    """Charges, refunds, reversals and freezes, with who and why, newest first."""
    rows, following = await history.audit(org_id, before=cursor, limit=limit)
    return AuditAnswer(
        data=[
            AuditEntryAnswer(
                id=row.id,
                kind=row.kind,
                credits=None if row.amount is None else format_credits(row.amount),
                frozen=row.frozen,
                reason=row.reason,
                actor=row.actor,
                created_at=row.created_at,
            )
            for row in rows
        ],
        next_cursor=following,
    )


@router.post("/wallets/{org_id}/refunds", status_code=201)
async def refund(org_id: UUID, body: RefundBody, service: WalletService, author: OperatorAuthor) -> RefundAnswer:
    """Give back what a request or a charge took, or a part of it, to the grants that it was taken from."""
    refunded = await service.refund(author, org_id, body.source_id, body.credits, reason=body.reason)
    return RefundAnswer(
        org_id=org_id,
        source_id=body.source_id,
        credits=format_credits(refunded.amount),
        refundable=format_credits(refunded.refundable),
        available=format_credits(refunded.available),
        receivable=format_credits(refunded.receivable),
    )


@router.put("/wallets/{org_id}/freeze")
async def freeze(org_id: UUID, body: FreezeBody, service: WalletService, author: OperatorAuthor) -> FreezeAnswer:
    """Refuse new requests and charges, or allow them again. What is in flight is settled either way."""
    result = await service.freeze(author, org_id, frozen=body.frozen, reason=body.reason)
    return FreezeAnswer(org_id=org_id, frozen=result.frozen)


@router.post("/grants", status_code=201)
async def grant(body: GrantBody, service: WalletService, author: OperatorAuthor) -> GrantedAnswer:
    """Put credits into an organisation's wallet."""
    granted = await service.grant(author, body.org_id, body.credits, reason=body.reason, expires_at=body.expires_at)
    return GrantedAnswer(
        grant_id=granted.grant_id,
        org_id=body.org_id,
        credits=format_credits(granted.amount),
        available=format_credits(granted.available),
        receivable=format_credits(granted.receivable),
    )


@router.get("/prices", dependencies=[Operators])
async def price_versions(
    prices: PriceService,
    model: Annotated[Model | None, Query()] = None,
    customer_class: Annotated[CustomerClass | None, Query()] = None,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: PageSize = PAGE_DEFAULT,
) -> PriceVersionsAnswer:
    """Every version ever published, scheduled ones too, the newest publication first."""
    found, following = await prices.versions(model=model, customer_class=customer_class, before=cursor, limit=limit)
    return PriceVersionsAnswer(
        data=[PriceVersionAnswer(**price_answer(p).model_dump(), valid_until=p.valid_until) for p in found],
        next_cursor=following,
    )


@router.post("/prices", status_code=201)
async def publish_price(body: PriceBody, prices: PriceService, author: OperatorAuthor) -> PriceAnswer:
    """A new version of a price. The present one ends when it begins; 409 when another is scheduled after that."""
    terms = PriceTerms(body.per_request, body.input, body.cached_input, body.output)
    return price_answer(await prices.publish(author, body.model, body.customer_class, terms, body.effective_from))
