"""What customers set and buy: budgets and top-ups."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, Table, Text, UniqueConstraint, Uuid, text

from services.billing.tables.schema import at, tables

# What a key or a member may spend of the wallet in a calendar day or month (UTC): spent and held together.
budget = Table(
    "budget",
    tables,
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("subject_id", Uuid, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
    at("updated_at"),
    CheckConstraint("subject IN ('key', 'member')", name="subject"),
    CheckConstraint("period IN ('day', 'month')", name="period"),
    CheckConstraint("amount >= 0", name="amount"),
)

topup = Table(
    "topup",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), nullable=False),
    Column("provider", Text, nullable=False),
    Column("provider_ref", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("status", Text, nullable=False, server_default=text("'pending'")),
    Column("grant_account_id", Uuid, ForeignKey("billing.credit_grant.account_id")),
    at("created_at"),
    at("updated_at"),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint("status IN ('pending', 'paid', 'failed')", name="status"),
    CheckConstraint("(status = 'paid') = (grant_account_id IS NOT NULL)", name="paid_is_granted"),
    UniqueConstraint("provider", "provider_ref"),
    Index(None, "wallet_id"),
)

SERVICE_GRANTS = {
    "budget": "SELECT, INSERT, DELETE, UPDATE (amount, updated_at)",
    "topup": "SELECT, INSERT, UPDATE (status, grant_account_id, updated_at)",
}
