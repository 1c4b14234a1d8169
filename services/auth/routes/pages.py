"""Pages of lists: the cursor is the id of the last row, opaque to clients."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Query

from shared.errors import InvalidRequest

PAGE_MAX = 100

PageSize = Annotated[int, Query(alias="limit", ge=1, le=PAGE_MAX)]


def cursor_of(row_id: UUID | None) -> str | None:
    """The cursor of the page that follows a row; None after the last page."""
    return None if row_id is None else base64.urlsafe_b64encode(row_id.bytes).rstrip(b"=").decode()


async def parse_cursor(
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")] = None,
) -> UUID | None:
    """The row that a page begins after. Raises InvalidRequest for what is no cursor of ours."""
    if cursor is None:
        return None
    try:
        return UUID(bytes=base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error) as e:
        raise InvalidRequest("cursor: send next_cursor of the page before, unchanged.", param="cursor") from e


Before = Annotated[UUID | None, Depends(parse_cursor)]
