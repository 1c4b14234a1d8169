"""What requests cost."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.billing.domain import CURRENCY, Price
from services.billing.routes.dependencies import PriceService, Reader, organisation
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])


class PriceAnswer(BaseModel):
    """Decimal credits: per request, and per million tokens of a class. A request's cost is rounded up once."""

    id: UUID
    model: str
    customer_class: str
    currency: str
    per_request: str
    input: str = Field(description="Per million input tokens that no cache served.")
    cached_input: str
    output: str
    valid_from: datetime


class PricesAnswer(BaseModel):
    data: list[PriceAnswer]


def price_answer(price: Price) -> PriceAnswer:
    return PriceAnswer(
        id=price.id,
        model=price.model,
        customer_class=price.customer_class,
        currency=CURRENCY,
        per_request=format_credits(price.terms.per_request),
        input=format_credits(price.terms.input),
        cached_input=format_credits(price.terms.cached_input),
        output=format_credits(price.terms.output),
        valid_from=price.valid_from,
    )


@router.get("/prices")
async def prices(service: PriceService, identity: Reader) -> PricesAnswer:
    """The caller's price for each model, in force now."""
    found = await service.in_force(organisation(identity), identity.plan)
    return PricesAnswer(data=[price_answer(p) for p in found])
