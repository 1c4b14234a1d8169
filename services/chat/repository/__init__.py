"""All SQL of chat, one file a table. A database that is away is Unavailable (storage_unavailable)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.chat.errors import storage_down
from shared.database import ERRORS, is_temporary


@contextmanager
def available() -> Iterator[None]:
    """Raises Unavailable for whatever the database cannot do right now; a fault of a statement stays one."""
    try:
        yield
    except ERRORS as e:
        if not is_temporary(e):
            raise
        raise storage_down(type(e).__name__) from e
