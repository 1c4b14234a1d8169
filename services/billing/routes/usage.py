"""What requests used."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from services.billing.repository.history import UsageRecord, UsageSum
from services.billing.routes.dependencies import HistoryService, OwnWallet
from services.billing.routes.fields import PAGE_DEFAULT, PageSize
from services.billing.routes.transactions import Cursor, TokensAnswer
from shared.errors import InvalidRequest
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

DAILY: list[Literal["day", "model", "key", "member"]] = ["day"]

_CURSOR = re.compile(r"u([0-9a-f]{32})\.([01])\Z", re.ASCII)


class UsageAnswer(TokensAnswer):
    """What one request used; `late` is what its settlement added after the hold had expired."""

    hold_id: UUID
    late: bool
    user_id: UUID | None
    key_id: UUID | None
    model: str
    build: str
    price_id: UUID
    cost: str
    finish_reason: str
    duration_ms: int
    request_id: str
    created_at: datetime


class UsagesAnswer(BaseModel):
    data: list[UsageAnswer]
    next_cursor: str | None


class UsageSumAnswer(TokensAnswer):
    """What the requests of one group used; a field that is not grouped by is null."""

    day: date | None
    model: str | None
    key_id: UUID | None
    user_id: UUID | None
    requests: int
    cost: str


class UsageSumsAnswer(BaseModel):
    data: list[UsageSumAnswer]
    has_more: bool = Field(description="There are more groups than fit: ask for fewer days.")


@router.get("/usage/summary")
async def summary(
    history: HistoryService,
    org_id: OwnWallet,
    since: Annotated[date | None, Query(alias="from", description="This month's first day, when left out.")] = None,
    until: Annotated[date | None, Query(alias="to", description="Not included.")] = None,
    group_by: Annotated[list[Literal["day", "model", "key", "member"]], Query(max_length=4)] = DAILY,
) -> UsageSumsAnswer:
    """Sums by day (UTC), model, key and member, in any combination: `group_by` may be repeated."""
    rows, has_more = await history.usage_sums(org_id, since=since, until=until, groups=group_by)
    return UsageSumsAnswer(data=[_sum(row) for row in rows], has_more=has_more)


@router.get("/usage")
async def usage(
    history: HistoryService, org_id: OwnWallet, cursor: Cursor = None, limit: PageSize = PAGE_DEFAULT
) -> UsagesAnswer:
    """Requests and what they used, newest first."""
    before = None if cursor is None else _position(cursor)
    rows, following = await history.usage(org_id, before=before, limit=limit)
    return UsagesAnswer(
        data=[_usage(row) for row in rows],
        next_cursor=None if following is None else f"u{following[0].hex}.{following[1]}",
    )


def _usage(row: UsageRecord) -> UsageAnswer:
    return UsageAnswer(
        hold_id=row.hold_id,
        late=row.part > 0,
        user_id=row.user_id,
        key_id=row.key_id,
        model=row.model,
        build=row.build,
        price_id=row.price_id,
        input_tokens=row.input_tokens,
        cached_input_tokens=row.cached_input_tokens,
        output_tokens=row.output_tokens,
        cost=format_credits(row.cost),
        finish_reason=row.finish_reason,
        duration_ms=row.duration_ms,
        request_id=row.request_id,
        created_at=row.created_at,
    )


def _sum(row: UsageSum) -> UsageSumAnswer:
    return UsageSumAnswer(
        day=row.day,
        model=row.model,
        key_id=row.key_id,
        user_id=row.user_id,
        requests=row.requests,
        input_tokens=row.input_tokens,
        cached_input_tokens=row.cached_input_tokens,
        output_tokens=row.output_tokens,
        cost=format_credits(row.cost),
    )


def _position(cursor: str) -> tuple[UUID, int]:
    match = _CURSOR.match(cursor)
    if match is None:
        raise InvalidRequest("This cursor is not one of ours; start from the first page.", param="cursor")
    return UUID(match[1]), int(match[2])
