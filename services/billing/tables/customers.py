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

# `provider_ref` is known before the provider is asked: our own id, or the reference of a bank transfer. `session_id` is
# the provider's, afterwards. What is paid has a grant of the same id.
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
    Column("currency", Text, nullable=False),
    Column("money_minor", BigInteger, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("session_id", Text),
    Column("checkout_url", Text),
    Column("failure", Text),
    at("checked_at"),
    CheckConstraint("money_minor >= 0", name="money_minor"),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint("status IN ('pending', 'paid', 'failed')", name="status"),
    CheckConstraint("(status = 'paid') = (grant_account_id IS NOT NULL)", name="paid_is_granted"),
    UniqueConstraint("provider", "provider_ref"),
    Index(None, "wallet_id", text("id DESC")),
    Index(None, "checked_at", postgresql_where=text("status = 'pending'")),
)

SERVICE_GRANTS = {
    "budget": "SELECT, INSERT, DELETE, UPDATE (amount, updated_at)",
    "topup": "SELECT, INSERT, "
    "UPDATE (status, grant_account_id, updated_at, session_id, checkout_url, failure, checked_at)",
}
