"""What each month came to."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from services.billing.domain import CURRENCY
from services.billing.errors import InvoiceNotFound
from services.billing.repository.invoices import Invoice, InvoiceLine
from services.billing.routes.dependencies import InvoiceService, OwnWallet
from services.billing.routes.fields import PageSize
from services.billing.service.invoices import InvoiceView
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

MONTHS_PER_PAGE = 12
Month = Annotated[str, Field(pattern=r"^20\d\d-(0[1-9]|1[0-2])$", examples=["2026-10"])]


class LineAnswer(BaseModel):
    """`amount` is what moved; `effect` what that did to the balance, signed."""

    kind: str = Field(description="`usage` of a model at one price; otherwise the kind of transaction.")
    source: str | None = Field(description="Of grants: where they came from.")
    model: str | None
    price_id: UUID | None
    count: int = Field(description="Requests, or transactions.")
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    amount: str
    effect: str


class InvoiceAnswer(BaseModel):
    """`opening` balance + the effects of all lines = `closing` balance, exactly. `total` is what was used,
    less refunds."""

    month: str
    org_id: UUID
    currency: str
    status: Literal["issued", "draft"]
    opening: str
    closing: str
    total: str
    issued_at: datetime | None


class InvoiceWithLinesAnswer(InvoiceAnswer):
    lines: list[LineAnswer]


class InvoicesAnswer(BaseModel):
    data: list[InvoiceAnswer]
    next_cursor: str | None


@router.get("/invoices")
async def invoices(
    service: InvoiceService,
    org_id: OwnWallet,
    cursor: Annotated[Month | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: PageSize = MONTHS_PER_PAGE,
) -> InvoicesAnswer:
    """Of every closed month, newest first."""
    before = None if cursor is None else _day(cursor)
    rows, following = await service.page(org_id, before=before, limit=limit)
    return InvoicesAnswer(
        data=[InvoiceAnswer(**_fields(row)) for row in rows],
        next_cursor=None if following is None else f"{following:%Y-%m}",
    )


@router.get("/invoices/{month}")
async def invoice(month: Month, service: InvoiceService, org_id: OwnWallet) -> InvoiceWithLinesAnswer:
    """Of one month (UTC), with its lines; a draft while the month is not over."""
    return _answer(await service.get(org_id, _day(month)))


def _day(month: str) -> date:
    try:
        return date.fromisoformat(f"{month}-01")
    except ValueError:
        raise InvoiceNotFound() from None


def _answer(view: InvoiceView) -> InvoiceWithLinesAnswer:
    return InvoiceWithLinesAnswer(**_fields(view.invoice), lines=[_line(line) for line in view.lines])


def _fields(invoice: Invoice) -> dict[str, object]:
    return {
        "month": f"{invoice.month:%Y-%m}",
        "org_id": invoice.wallet_id,
        "currency": CURRENCY,
        "status": "draft" if invoice.issued_at is None else "issued",
        "opening": format_credits(invoice.opening),
        "closing": format_credits(invoice.closing),
        "total": format_credits(invoice.total),
        "issued_at": invoice.issued_at,
    }


def _line(line: InvoiceLine) -> LineAnswer:
    return LineAnswer(
        kind=line.kind,
        source=line.source,
        model=line.model,
        price_id=line.price_id,
        count=line.count,
        input_tokens=line.input_tokens,
        cached_input_tokens=line.cached_input_tokens,
        output_tokens=line.output_tokens,
        amount=format_credits(line.amount),
        effect=format_credits(line.effect),
    )
