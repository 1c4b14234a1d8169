"""Webhooks and what they tell of: endpoints, an outbox with its deliveries, thresholds of the balance.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE billing.webhook_endpoint (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        url TEXT NOT NULL,
        secret_kid TEXT NOT NULL,
        secret_version INTEGER NOT NULL,
        previous_until TIMESTAMPTZ,
        disabled_reason TEXT,
        created_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_webhook_endpoint PRIMARY KEY (id),
        CONSTRAINT ck_webhook_endpoint_secret_version CHECK (secret_version >= 1),
        CONSTRAINT fk_webhook_endpoint_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id)
    )
    """,
    "CREATE INDEX ix_webhook_endpoint_wallet_id ON billing.webhook_endpoint (wallet_id)",
    """
    CREATE TABLE billing.webhook_event (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        type TEXT NOT NULL,
        body TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_webhook_event PRIMARY KEY (id)
    )
    """,
    """
    CREATE TABLE billing.webhook_delivery (
        event_id UUID NOT NULL,
        endpoint_id UUID NOT NULL,
        status TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        due_at TIMESTAMPTZ NOT NULL,
        response_status INTEGER,
        error TEXT,
        updated_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_webhook_delivery PRIMARY KEY (event_id, endpoint_id),
        CONSTRAINT ck_webhook_delivery_status CHECK (status IN ('pending', 'delivered', 'failed')),
        CONSTRAINT fk_webhook_delivery_event_id FOREIGN KEY(event_id)
            REFERENCES billing.webhook_event (id) ON DELETE CASCADE,
        CONSTRAINT fk_webhook_delivery_endpoint_id FOREIGN KEY(endpoint_id)
            REFERENCES billing.webhook_endpoint (id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX ix_webhook_delivery_endpoint_id ON billing.webhook_delivery (endpoint_id, event_id DESC)",
    "CREATE INDEX ix_webhook_delivery_due_at ON billing.webhook_delivery (due_at) WHERE status = 'pending'",
    """
    CREATE TABLE billing.balance_threshold (
        wallet_id UUID NOT NULL,
        amount BIGINT NOT NULL,
        is_below BOOLEAN NOT NULL,
        seen_seq BIGINT NOT NULL,
        CONSTRAINT pk_balance_threshold PRIMARY KEY (wallet_id, amount),
        CONSTRAINT ck_balance_threshold_amount CHECK (amount > 0),
        CONSTRAINT fk_balance_threshold_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id)
    )
    """,
)


def upgrade() -> None:
    """Make the tables."""
    for statement in TABLES:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Drop them with what is in them."""
    for table in ("balance_threshold", "webhook_delivery", "webhook_event", "webhook_endpoint"):
        op.execute(f"DROP TABLE billing.{table}")
