"""All SQL of chat, one file a table. A database that is away is Unavailable (storage_unavailable)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from services.chat.errors import storage_down


@contextmanager
def available() -> Iterator[None]:
    """Raises Unavailable for whatever the database cannot do right now."""
    try:
        yield
    except (DBAPIError, PoolTimeout, OSError, TimeoutError) as e:
        raise storage_down(type(e).__name__) from e
