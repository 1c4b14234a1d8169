"""Webhooks: endpoints, the outbox of events and their deliveries, and the balances that customers want to hear of."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Index, Integer, Table, Text, Uuid, text

from services.billing.tables.schema import at, tables

# The secret is derived from its key (`secret_kid`) and version; the version before signs too until `previous_until`.
webhook_endpoint = Table(
    "webhook_endpoint",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), nullable=False),
    Column("url", Text, nullable=False),
    Column("secret_kid", Text, nullable=False),
    Column("secret_version", Integer, nullable=False),
    at("previous_until", nullable=True),
    Column("disabled_reason", Text),
    at("created_at"),
    CheckConstraint("secret_version >= 1", name="secret_version"),
    Index(None, "wallet_id"),
)

# No reference to the wallet: events of many are written in one transaction, which must not wait for their locks.
webhook_event = Table(
    "webhook_event",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, nullable=False),
    Column("type", Text, nullable=False),
    Column("body", Text, nullable=False),
    at("created_at"),
)

webhook_delivery = Table(
    "webhook_delivery",
    tables,
    Column("event_id", Uuid, ForeignKey("billing.webhook_event.id", ondelete="CASCADE"), primary_key=True),
    Column("endpoint_id", Uuid, ForeignKey("billing.webhook_endpoint.id", ondelete="CASCADE"), primary_key=True),
    Column("status", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    at("due_at"),
    Column("response_status", Integer),
    Column("error", Text),
    at("updated_at"),
    CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
    Index(None, "endpoint_id", text("event_id DESC")),
    Index(None, "due_at", postgresql_where=text("status = 'pending'")),
)

balance_threshold = Table(
    "balance_threshold",
    tables,
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), primary_key=True),
    Column("amount", BigInteger, primary_key=True),
    Column("is_below", Boolean, nullable=False),
    Column("seen_seq", BigInteger, nullable=False),
    CheckConstraint("amount > 0", name="amount"),
)

SERVICE_GRANTS = {
    "webhook_endpoint": "SELECT, INSERT, DELETE, UPDATE (secret_kid, secret_version, previous_until, disabled_reason)",
    "webhook_event": "SELECT, INSERT, DELETE",
    "webhook_delivery": "SELECT, INSERT, UPDATE (status, attempts, due_at, response_status, error, updated_at)",
    "balance_threshold": "SELECT, INSERT, DELETE, UPDATE (is_below, seen_seq)",
}
