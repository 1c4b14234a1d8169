"""All SQL of chat, one file a table.

A database that is away is Unavailable (storage_unavailable), a value that it cannot take, such as a text with U+0000 in
it, InvalidRequest (invalid_value); any other fault of a statement stays one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.chat.errors import not_storable, storage_down
from shared.database import ERRORS, is_temporary, sqlstate

_DATA_EXCEPTION = "22"


@contextmanager
def available() -> Iterator[None]:
    """Raises Unavailable for what the database cannot do right now, InvalidRequest for a value that it cannot take."""
    try:
        yield
    except ERRORS as e:
        if is_temporary(e):
            raise storage_down(type(e).__name__) from e
        if sqlstate(e).startswith(_DATA_EXCEPTION):
            raise not_storable() from e
        raise
