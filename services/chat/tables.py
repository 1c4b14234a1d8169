"""The tables of schema `chat`; migrations/versions writes the same by hand.

Every row belongs to an organisation; the repository filters by it in every statement.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from shared.database import metadata

tables = metadata("chat")

KINDS = "kind IN ('completion', 'response', 'message')"
NO_METADATA = text("'{}'::jsonb")

stored = Table(
    "stored",
    tables,
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("org_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("build", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("messages", JSON, nullable=False),  # not JSONB, which refuses the character NUL
    Column("document", JSON, nullable=False),
    Column("metadata", JSONB, nullable=False, server_default=NO_METADATA),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("settled_nano", BigInteger),
    Column("duration_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("id", name="pk_stored"),
    CheckConstraint(KINDS, name="kind"),
    CheckConstraint("input_tokens >= 0 AND output_tokens >= 0 AND duration_ms >= 0", name="counts"),
    Index("ix_stored_org_id_kind_created_at", "org_id", "kind", text("created_at DESC"), text("id DESC")),
    Index("ix_stored_expires_at", "expires_at"),
)

replay = Table(
    "replay",
    tables,
    Column("org_id", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("attempt", Text, nullable=False),
    Column("busy_until", DateTime(timezone=True)),
    Column("result", LargeBinary),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("org_id", "key", name="pk_replay"),
    CheckConstraint("(busy_until IS NULL) = (result IS NOT NULL)", name="busy_or_done"),
    Index("ix_replay_expires_at", "expires_at"),
)

retention = Table(
    "retention",
    tables,
    Column("org_id", Text, nullable=False),
    Column("days", Integer, nullable=False),
    PrimaryKeyConstraint("org_id", name="pk_retention"),
    CheckConstraint("days BETWEEN 1 AND 3650", name="days"),
)

SERVICE_GRANTS: Mapping[str, str] = {
    table.name: "SELECT, INSERT, UPDATE, DELETE" for table in (stored, replay, retention)
}
