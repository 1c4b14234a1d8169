"""What is kept of conversations, results by idempotency key, and how long an organisation keeps things.

Revision ID: 0001
Revises: none
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE chat.stored (
        id TEXT NOT NULL,
        kind TEXT NOT NULL,
        org_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        key_id TEXT NOT NULL,
        model TEXT NOT NULL,
        build TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL,
        messages JSON NOT NULL,
        document JSON NOT NULL,
        metadata JSONB NOT NULL DEFAULT '{}'::jsonb,
        input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        settled_nano BIGINT,
        duration_ms BIGINT NOT NULL,
        CONSTRAINT pk_stored PRIMARY KEY (id),
        CONSTRAINT ck_stored_kind CHECK (kind IN ('completion', 'response', 'message')),
        CONSTRAINT ck_stored_counts CHECK (input_tokens >= 0 AND output_tokens >= 0 AND duration_ms >= 0)
    )
    """,
    "CREATE INDEX ix_stored_org_id_kind_created_at ON chat.stored (org_id, kind, created_at DESC, id DESC)",
    "CREATE INDEX ix_stored_expires_at ON chat.stored (expires_at)",
    """
    CREATE TABLE chat.replay (
        org_id TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint BYTEA NOT NULL,
        attempt TEXT NOT NULL,
        busy_until TIMESTAMPTZ,
        result BYTEA,
        expires_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_replay PRIMARY KEY (org_id, key),
        CONSTRAINT ck_replay_busy_or_done CHECK ((busy_until IS NULL) = (result IS NOT NULL))
    )
    """,
    "CREATE INDEX ix_replay_expires_at ON chat.replay (expires_at)",
    """
    CREATE TABLE chat.retention (
        org_id TEXT NOT NULL,
        days INTEGER NOT NULL,
        CONSTRAINT pk_retention PRIMARY KEY (org_id),
        CONSTRAINT ck_retention_days CHECK (days BETWEEN 1 AND 3650)
    )
    """,
)


def upgrade() -> None:
    """Make the tables and their indexes."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Forget everything."""
    for table in ("retention", "replay", "stored"):
        op.execute(f"DROP TABLE chat.{table}")
