"""Alembic's entry for schema `auth`."""

from services.auth.tables import Base
from shared.database import run_migrations

run_migrations(Base.metadata)
