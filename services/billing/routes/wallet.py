"""The wallet of the caller's organisation."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from services.billing.domain import CURRENCY, WalletView
from services.billing.repository.wallets import BalanceAt, GrantView
from services.billing.routes.dependencies import OwnWallet, Person, WalletService
from services.billing.routes.fields import PAGE_DEFAULT, PageSize, Timestamp
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
    spent: str = Field(description="Everything that usage and charges ever cost, less refunds.")
    frozen: bool
    frozen_reason: str | None = Field(description="Why, where somebody said so.")
    created_at: datetime


class BalanceAnswer(BaseModel):
    """`balance` after everything booked at or before `at`; `number` is that of the last transaction until then."""

    org_id: UUID
    currency: str
    at: datetime
    balance: str
    number: int


class GrantAnswer(BaseModel):
    """Credits that were put in at once. `held` is a part of `left`."""

    id: UUID
    source: str
    reason: str
    credits: str
    left: str
    held: str
    created_at: datetime
    expires_at: datetime | None


class GrantsAnswer(BaseModel):
    data: list[GrantAnswer]


@router.get("/wallet")
async def wallet(service: WalletService, org_id: OwnWallet, user_id: Person) -> WalletAnswer:
    """Balance, holds and debts now. The first look opens the wallet; a new person's brings their sign-up credits."""
    return wallet_answer(await service.wallet(org_id, user_id))


@router.get("/wallet/balance")
async def balance(
    service: WalletService,
    org_id: OwnWallet,
    at: Annotated[Timestamp | None, Query(description="Now, when left out.")] = None,
) -> BalanceAnswer:
    """The balance as of a time."""
    return balance_answer(org_id, await service.balance_at(org_id, at))


@router.get("/grants")
async def grants(
    service: WalletService,
    org_id: OwnWallet,
    spent: Annotated[bool, Query(description="Those with nothing left, too.")] = False,
    limit: PageSize = PAGE_DEFAULT,
) -> GrantsAnswer:
    """In the order in which they are drawn: by priority, then expiry, then age."""
    found = await service.grants(org_id, all_of_them=spent, limit=limit)
    return GrantsAnswer(data=[_grant(view) for view in found])


def wallet_answer(view: WalletView) -> WalletAnswer:
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
        frozen_reason=view.frozen_reason,
        created_at=view.created_at,
    )


def balance_answer(org_id: UUID, found: BalanceAt) -> BalanceAnswer:
    return BalanceAnswer(
        org_id=org_id, currency=CURRENCY, at=found.at, balance=format_credits(found.balance), number=found.seq
    )


def _grant(view: GrantView) -> GrantAnswer:
    return GrantAnswer(
        id=view.id,
        source=view.source,
        reason=view.reason,
        credits=format_credits(view.amount),
        left=format_credits(view.left),
        held=format_credits(view.held),
        created_at=view.effective_at,
        expires_at=view.expires_at,
    )
