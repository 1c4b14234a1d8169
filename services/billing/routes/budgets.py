"""What keys and members may spend of the wallet."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.billing.domain import Budget, BudgetSubject
from services.billing.routes.dependencies import BudgetService, CustomerAuthor, OwnWallet
from services.billing.routes.fields import Body, CreditsIn
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing/budgets", tags=["billing"])

_SUBJECTS: dict[str, BudgetSubject] = {"keys": "key", "members": "member"}


class BudgetBody(Body):
    """Decimal credits of a calendar day and month, in UTC; null or left out for no limit."""

    day: CreditsIn | None = None
    month: CreditsIn | None = None


class BudgetAnswer(BaseModel):
    subject: BudgetSubject
    id: UUID
    day: str | None = Field(description="Decimal credits; null for no limit.")
    month: str | None
    spent_day: str = Field(description="Of today, without what is held.")
    spent_month: str


class BudgetsAnswer(BaseModel):
    data: list[BudgetAnswer]


@router.get("")
async def budgets(service: BudgetService, org_id: OwnWallet) -> BudgetsAnswer:
    """Every key and member of the organisation that has one."""
    return BudgetsAnswer(data=[_answer(budget) for budget in await service.all(org_id)])


@router.put("/{subjects}/{subject_id}")
async def set_budget(
    subjects: Literal["keys", "members"],
    subject_id: UUID,
    body: BudgetBody,
    service: BudgetService,
    author: CustomerAuthor,
) -> BudgetAnswer:
    """In place of what there was, in force for the next request. A key cannot change its own."""
    return _answer(await service.set(author, author.tenant, _SUBJECTS[subjects], subject_id, body.day, body.month))


def _answer(budget: Budget) -> BudgetAnswer:
    return BudgetAnswer(
        subject=budget.subject,
        id=budget.subject_id,
        day=None if budget.day is None else format_credits(budget.day),
        month=None if budget.month is None else format_credits(budget.month),
        spent_day=format_credits(budget.spent_day),
        spent_month=format_credits(budget.spent_month),
    )
