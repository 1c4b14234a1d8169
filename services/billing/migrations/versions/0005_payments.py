"""What top-ups need to be paid for: money, the provider's session, when it was last asked about.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing has written a top-up before this."""
    op.execute("""
        ALTER TABLE billing.topup
            ADD COLUMN currency TEXT NOT NULL,
            ADD COLUMN money_minor BIGINT NOT NULL,
            ADD COLUMN requested_by TEXT NOT NULL,
            ADD COLUMN session_id TEXT,
            ADD COLUMN checkout_url TEXT,
            ADD COLUMN failure TEXT,
            ADD COLUMN checked_at TIMESTAMPTZ NOT NULL,
            ADD CONSTRAINT ck_topup_money_minor CHECK (money_minor >= 0)
        """)
    op.execute("DROP INDEX billing.ix_topup_wallet_id")
    op.execute("CREATE INDEX ix_topup_wallet_id ON billing.topup (wallet_id, id DESC)")
    op.execute("CREATE INDEX ix_topup_checked_at ON billing.topup (checked_at) WHERE status = 'pending'")


def downgrade() -> None:
    """Drop what was added, with what is in it."""
    op.execute("DROP INDEX billing.ix_topup_wallet_id, billing.ix_topup_checked_at")
    op.execute("CREATE INDEX ix_topup_wallet_id ON billing.topup (wallet_id)")
    op.execute("""
        ALTER TABLE billing.topup DROP COLUMN currency, DROP COLUMN money_minor, DROP COLUMN requested_by,
            DROP COLUMN session_id, DROP COLUMN checkout_url, DROP COLUMN failure, DROP COLUMN checked_at
        """)
