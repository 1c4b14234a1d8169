"""What the reconciler keeps: where it is, and what it found."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, Index, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from services.billing.tables.schema import at, tables

discrepancy = Table(
    "discrepancy",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, nullable=False),
    Column("check_name", Text, nullable=False),
    Column("detail", Text, nullable=False),
    at("found_at"),
    Index(None, "wallet_id"),
)

reconciliation = Table(
    "reconciliation",
    tables,
    Column("walk", Text, primary_key=True),
    Column("after", Uuid),
    Column("begun", JSONB),
    at("cycle_started_at"),
    CheckConstraint("walk IN ('wallets', 'holds')", name="walk"),
)

SERVICE_GRANTS = {
    "discrepancy": "SELECT, INSERT",
    "reconciliation": "SELECT, INSERT, UPDATE (after, begun, cycle_started_at)",
}
