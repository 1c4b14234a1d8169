"""What the tables have in common."""

from __future__ import annotations

from sqlalchemy import Column
from sqlalchemy.dialects.postgresql import TIMESTAMP

from shared.database import metadata

tables = metadata("billing")

HOT_FILLFACTOR = 50  # room for HOT updates on the page itself


def at(name: str, *, nullable: bool = False) -> Column[object]:
    """A moment: a timestamp with its time zone."""
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable)
