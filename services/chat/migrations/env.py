"""Alembic's entry for schema `chat`."""

from services.chat.tables import tables
from shared.database import run_migrations

run_migrations(tables)
