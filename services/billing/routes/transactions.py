"""What happened to the wallet: transactions, and the usage behind them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from services.billing.repository.history import TransactionRow, UsageRecord
from services.billing.routes.dependencies import BillingService, OwnWallet
from services.billing.routes.fields import PAGE_DEFAULT, PageSize, Timestamp
from shared.errors import InvalidRequest
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

Kind = Literal["grant", "usage", "late", "receivable", "repayment", "expiry"]
Cursor = Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")]
CREDITING = ("grant",)

_SEQ_CURSOR = re.compile(r"t([1-9]\d{0,17})\Z", re.ASCII)
_USAGE_CURSOR = re.compile(r"u([0-9a-f]{32})\.([01])\Z", re.ASCII)


class TokensAnswer(BaseModel):
    """`input_tokens` includes the cached ones."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


class TransactionAnswer(BaseModel):
    """One transfer of the ledger; a request that drew on two grants has two."""

    id: UUID
    kind: Kind = Field(
        description="`grant` adds; `usage`, `late` (after the hold's expiry), `repayment` of what was owed and "
        "`expiry` of a grant take from the balance; `receivable` is usage beyond the credits: owed, the balance stays."
    )
    amount: str = Field(description="Signed decimal credits.")
    balance_after: str
    hold_id: UUID | None
    model: str | None
    build: str | None
    usage: TokensAnswer | None
    reason: str | None
    expires_at: datetime | None
    created_at: datetime


class TransactionsAnswer(BaseModel):
    data: list[TransactionAnswer]
    next_cursor: str | None


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


@router.get("/transactions")
async def transactions(
    billing: BillingService,
    org_id: OwnWallet,
    kind: Annotated[list[Kind] | None, Query()] = None,
    since: Annotated[Timestamp | None, Query(alias="from")] = None,
    until: Annotated[Timestamp | None, Query(alias="to", description="Not included.")] = None,
    cursor: Cursor = None,
    limit: PageSize = PAGE_DEFAULT,
) -> TransactionsAnswer:
    """Newest first. `kind` may be repeated."""
    rows, following = await billing.transactions(
        org_id,
        before_seq=None if cursor is None else _seq(cursor),
        kinds=None if kind is None else list(kind),
        since=since,
        until=until,
        limit=limit,
    )
    return TransactionsAnswer(
        data=[_transaction(row) for row in rows], next_cursor=None if following is None else f"t{following}"
    )


@router.get("/usage")
async def usage(
    billing: BillingService, org_id: OwnWallet, cursor: Cursor = None, limit: PageSize = PAGE_DEFAULT
) -> UsagesAnswer:
    """Requests and what they used, newest first."""
    before = None if cursor is None else _usage_position(cursor)
    rows, following = await billing.usage(org_id, before=before, limit=limit)
    return UsagesAnswer(
        data=[_usage(row) for row in rows],
        next_cursor=None if following is None else f"u{following[0].hex}.{following[1]}",
    )


def _transaction(row: TransactionRow) -> TransactionAnswer:
    tokens = None
    if row.input_tokens is not None and row.cached_input_tokens is not None and row.output_tokens is not None:
        tokens = TokensAnswer(
            input_tokens=row.input_tokens,
            cached_input_tokens=row.cached_input_tokens,
            output_tokens=row.output_tokens,
        )
    return TransactionAnswer.model_validate(
        {
            "id": row.id,
            "kind": row.kind,
            "amount": format_credits(row.amount if row.kind in CREDITING else -row.amount),
            "balance_after": format_credits(row.balance_after),
            "hold_id": row.hold_id,
            "model": row.model,
            "build": row.build,
            "usage": tokens,
            "reason": row.reason,
            "expires_at": row.expires_at,
            "created_at": row.created_at,
        }
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


def _seq(cursor: str) -> int:
    match = _SEQ_CURSOR.match(cursor)
    if match is None:
        raise InvalidRequest("This cursor is not one of ours; start from the first page.", param="cursor")
    return int(match[1])


def _usage_position(cursor: str) -> tuple[UUID, int]:
    match = _USAGE_CURSOR.match(cursor)
    if match is None:
        raise InvalidRequest("This cursor is not one of ours; start from the first page.", param="cursor")
    return UUID(match[1]), int(match[2])
