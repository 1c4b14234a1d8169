"""Alembic's entry for schema `billing`."""

from services.billing.tables import tables
from shared.database import run_migrations

run_migrations(tables)
