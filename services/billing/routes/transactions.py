"""What happened to the wallet, in pages and as a stream."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import orjson
from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from services.billing.ledger.rows import TransferCode
from services.billing.repository.history import TransactionFilter, TransactionRow
from services.billing.routes.dependencies import HistoryService, OwnWallet
from services.billing.routes.fields import PAGE_DEFAULT, Model, PageSize, Timestamp
from services.billing.service import History
from shared.errors import InvalidRequest
from shared.money import format_credits

router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

Cursor = Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")]
Since = Annotated[Timestamp | None, Query(alias="from")]
Until = Annotated[Timestamp | None, Query(alias="to", description="Not included.")]
# These take credits, or add to what is owed; all others give.
TAKING = frozenset(("usage", "late", "charge", "receivable", "repayment", "expiry", "reversal"))
COLUMNS = (
    *("number", "id", "created_at", "kind", "amount", "balance_after", "hold_id", "model", "build"),
    *("input_tokens", "cached_input_tokens", "output_tokens", "reason", "expires_at"),
)

_SEQ_CURSOR = re.compile(r"t([1-9]\d{0,17})\Z", re.ASCII)


class TokensAnswer(BaseModel):
    """`input_tokens` includes the cached ones."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


class TransactionAnswer(BaseModel):
    """One transfer of the ledger; a request that drew on two grants has two."""

    id: UUID
    number: int = Field(description="Its place in the wallet's history: 1, 2, 3, … without a gap.")
    kind: TransferCode = Field(
        description="`grant` adds, `refund` gives back; `usage`, `late` (after the hold's expiry), `charge`, "
        "`repayment` of what was owed and `expiry` of a grant take from the balance; `receivable` is usage beyond the "
        "credits: owed, the balance stays; `reversal` takes credits back whose payment went back, or adds to what is "
        "owed."
    )
    amount: str = Field(description="Signed decimal credits.")
    balance_after: str
    hold_id: UUID | None = Field(description="The request's hold, the charge, or the top-up of a reversal.")
    model: str | None
    build: str | None
    usage: TokensAnswer | None
    reason: str | None
    expires_at: datetime | None
    created_at: datetime


class TransactionsAnswer(BaseModel):
    data: list[TransactionAnswer]
    next_cursor: str | None = Field(
        description="A page of a filter that few pass may be short and still have a next one."
    )


async def wanted(
    kind: Annotated[list[TransferCode] | None, Query(description="May be repeated.")] = None,
    model: Annotated[Model | None, Query()] = None,
    key_id: Annotated[UUID | None, Query()] = None,
    user_id: Annotated[UUID | None, Query()] = None,
) -> TransactionFilter:
    """Which transactions."""
    return TransactionFilter(None if kind is None else tuple(kind), model, key_id, user_id)


Wanted = Annotated[TransactionFilter, Depends(wanted)]


@router.get("/transactions")
async def transactions(
    history: HistoryService,
    org_id: OwnWallet,
    filters: Wanted,
    since: Since = None,
    until: Until = None,
    cursor: Cursor = None,
    limit: PageSize = PAGE_DEFAULT,
) -> TransactionsAnswer:
    """Newest first."""
    return await transactions_page(history, org_id, filters, since, until, cursor, limit)


@router.get("/transactions/export", response_class=StreamingResponse)
async def export(
    history: HistoryService,
    org_id: OwnWallet,
    filters: Wanted,
    since: Since = None,
    until: Until = None,
    form: Annotated[Literal["csv", "ndjson"], Query(alias="format")] = "csv",
) -> StreamingResponse:
    """Everything up to now, oldest first, as a stream that goes as fast as it is read."""
    pieces = await history.export(org_id, filters, since=since, until=until)
    render, head, media_type = _FORMS[form]
    return StreamingResponse(
        _rendered(pieces, render, head),
        media_type=media_type,
        headers={"content-disposition": f'attachment; filename="transactions.{form}"'},
    )


async def transactions_page(
    history: History,
    org_id: UUID,
    filters: TransactionFilter,
    since: datetime | None,
    until: datetime | None,
    cursor: str | None,
    limit: int,
) -> TransactionsAnswer:
    """The same page for whoever may see it. Raises InvalidRequest for a cursor that is not ours."""
    before = None if cursor is None else _seq(cursor)
    rows, following = await history.transactions(
        org_id, filters, before_seq=before, since=since, until=until, limit=limit
    )
    return TransactionsAnswer(
        data=[_transaction(row) for row in rows], next_cursor=None if following is None else f"t{following}"
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
            "number": row.seq,
            "kind": row.kind,
            "amount": _amount(row),
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


async def _rendered(
    pieces: AsyncIterator[list[TransactionRow]], render: Callable[[Sequence[TransactionRow]], bytes], head: bytes
) -> AsyncIterator[bytes]:
    if head:
        yield head
    async for rows in pieces:
        yield render(rows)


def _csv(rows: Sequence[TransactionRow]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(_cells(row) for row in rows)
    return text.getvalue().encode()


def _ndjson(rows: Sequence[TransactionRow]) -> bytes:
    return b"".join(
        orjson.dumps(dict(zip(COLUMNS, _values(row), strict=True)), option=orjson.OPT_APPEND_NEWLINE) for row in rows
    )


def _values(row: TransactionRow) -> tuple[object, ...]:
    return (
        row.seq,
        str(row.id),
        row.created_at.isoformat(),
        row.kind,
        _amount(row),
        format_credits(row.balance_after),
        None if row.hold_id is None else str(row.hold_id),
        row.model,
        row.build,
        row.input_tokens,
        row.cached_input_tokens,
        row.output_tokens,
        row.reason,
        None if row.expires_at is None else row.expires_at.isoformat(),
    )


def _cells(row: TransactionRow) -> list[object]:
    """What was typed in by people must not become a formula where a spreadsheet opens the file."""
    cells = list(_values(row))
    if row.reason is not None and row.reason[:1] in "=+-@\t\r":
        cells[COLUMNS.index("reason")] = f"'{row.reason}"
    return cells


def _amount(row: TransactionRow) -> str:
    return format_credits(-row.amount if row.kind in TAKING else row.amount)


def _seq(cursor: str) -> int:
    match = _SEQ_CURSOR.match(cursor)
    if match is None:
        raise InvalidRequest("This cursor is not one of ours; start from the first page.", param="cursor")
    return int(match[1])


_FORMS: dict[str, tuple[Callable[[Sequence[TransactionRow]], bytes], bytes, str]] = {
    "csv": (_csv, (",".join(COLUMNS) + "\r\n").encode(), "text/csv; charset=utf-8"),
    "ndjson": (_ndjson, b"", "application/x-ndjson"),
}
