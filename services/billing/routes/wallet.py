"""The wallet of the caller's organisation."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.billing.domain import CURRENCY
from services.billing.routes.dependencies import BillingService, OwnWallet, Person
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])


class WalletAnswer(BaseModel):
    """Amounts are exact decimal strings of credits."""

    org_id: UUID
    currency: str
    balance: str = Field(description="Credits not spent, held ones included.")
    held: str = Field(description="Reserved by requests in flight.")
    available: str = Field(description="What a new request may reserve.")
    receivable: str = Field(description="Owed for usage beyond the credits; new credits pay it first.")
    granted: str = Field(description="Everything ever put in.")
    spent: str = Field(description="Everything that usage ever cost.")
    frozen: bool
    created_at: datetime


@router.get("/wallet")
async def wallet(billing: BillingService, org_id: OwnWallet, user_id: Person) -> WalletAnswer:
    """Balance, holds and debts now. The first look opens the wallet; a new person's brings their sign-up credits."""
    view = await billing.wallet(org_id, user_id)
    return WalletAnswer(
        org_id=view.org_id,
        currency=CURRENCY,
        balance=format_credits(view.balance),
        held=format_credits(view.held),
        available=format_credits(view.available),
        receivable=format_credits(view.receivable),
        granted=format_credits(view.granted),
        spent=format_credits(view.spent),
        frozen=view.is_frozen,
        created_at=view.created_at,
    )
