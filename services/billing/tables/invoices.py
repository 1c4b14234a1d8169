"""Invoices: what a month of a wallet came to, written once."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    ForeignKey,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
)

from services.billing.tables.schema import at, tables

# The transfers numbered from `after_seq` (not included) to `until_seq`: invoices follow each other without a gap.
invoice = Table(
    "invoice",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), nullable=False),
    Column("month", Date, nullable=False),
    Column("after_seq", BigInteger, nullable=False),
    Column("until_seq", BigInteger, nullable=False),
    Column("opening", BigInteger, nullable=False),
    Column("closing", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    at("issued_at"),
    CheckConstraint("0 <= after_seq AND after_seq <= until_seq", name="range"),
    UniqueConstraint("wallet_id", "month"),
)

invoice_line = Table(
    "invoice_line",
    tables,
    Column("invoice_id", Uuid, ForeignKey("billing.invoice.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("source", Text),
    Column("model", Text),
    Column("price_id", Uuid, ForeignKey("billing.price.id")),
    Column("count", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("effect", BigInteger, nullable=False),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint("effect BETWEEN -amount AND amount", name="effect"),
)

APPEND_ONLY = ("invoice", "invoice_line")
SERVICE_GRANTS = dict.fromkeys(APPEND_ONLY, "SELECT, INSERT")
