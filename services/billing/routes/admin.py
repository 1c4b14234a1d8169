"""For operators: grant credits, publish prices. Every write wants an Idempotency-Key."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.billing.domain import DEFAULT_CLASS, PriceTerms
from services.billing.routes.dependencies import BillingService, CurrentAuthor, PriceService
from services.billing.routes.fields import Body, CreditsIn, CustomerClass, Model, PositiveCreditsIn, Timestamp
from services.billing.routes.prices import PriceAnswer, price_answer
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/admin/billing", tags=["admin"])


class GrantBody(Body):
    org_id: UUID
    credits: PositiveCreditsIn
    reason: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
    expires_at: Timestamp | None = None


class GrantAnswer(BaseModel):
    """`available` and `receivable` are the wallet's after the grant."""

    grant_id: UUID
    org_id: UUID
    credits: str
    available: str
    receivable: str


class PriceBody(Body):
    """Decimal credits: per request, and per million tokens of a class."""

    model: Model
    customer_class: CustomerClass = DEFAULT_CLASS
    per_request: CreditsIn = 0
    input: CreditsIn
    cached_input: CreditsIn
    output: CreditsIn
    effective_from: Timestamp | None = Field(None, description="Now, when left out. Never in the past.")


@router.post("/grants", status_code=201)
async def grant(body: GrantBody, billing: BillingService, author: CurrentAuthor) -> GrantAnswer:
    """Put credits into an organisation's wallet."""
    granted = await billing.grant(author, body.org_id, body.credits, reason=body.reason, expires_at=body.expires_at)
    return GrantAnswer(
        grant_id=granted.grant_id,
        org_id=body.org_id,
        credits=format_credits(granted.amount),
        available=format_credits(granted.available),
        receivable=format_credits(granted.receivable),
    )


@router.post("/prices", status_code=201)
async def publish_price(body: PriceBody, prices: PriceService, author: CurrentAuthor) -> PriceAnswer:
    """A new version of a price. The present one ends when it begins; 409 when another is scheduled after that."""
    terms = PriceTerms(body.per_request, body.input, body.cached_input, body.output)
    return price_answer(await prices.publish(author, body.model, body.customer_class, terms, body.effective_from))
