"""E-mail: what is to be sent, and the tokens that were.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

ORDERS = """
    CREATE TABLE auth.email_outbox (
        id uuid NOT NULL CONSTRAINT pk_email_outbox PRIMARY KEY,
        purpose text NOT NULL,
        address text NOT NULL,
        payload jsonb NOT NULL DEFAULT '{}'::jsonb,
        created_at timestamptz NOT NULL,
        due_at timestamptz,
        attempts integer NOT NULL DEFAULT 0,
        CONSTRAINT ck_email_outbox_purpose CHECK (purpose IN ('register', 'verify', 'reset'))
    )
"""
TOKENS = """
    CREATE TABLE auth.email_token (
        digest text NOT NULL CONSTRAINT pk_email_token PRIMARY KEY,
        purpose text NOT NULL,
        address text NOT NULL,
        user_id uuid CONSTRAINT fk_email_token_user_id REFERENCES auth.user_account (id),
        payload jsonb NOT NULL DEFAULT '{}'::jsonb,
        expires_at timestamptz NOT NULL,
        CONSTRAINT ck_email_token_purpose CHECK (purpose IN ('register', 'verify', 'reset'))
    )
"""


def upgrade() -> None:
    """Who is there already counts as verified: a constant default says so without rewriting a row, and then goes."""
    op.execute("ALTER TABLE auth.user_account ADD COLUMN email_verified_at timestamptz DEFAULT now()")
    op.execute("ALTER TABLE auth.user_account ALTER COLUMN email_verified_at DROP DEFAULT")
    op.execute(ORDERS)
    op.execute("CREATE INDEX ix_email_outbox_due_at ON auth.email_outbox (due_at)")
    op.execute("CREATE INDEX ix_email_outbox_address_created_at ON auth.email_outbox (address, created_at)")
    op.execute("CREATE INDEX ix_email_outbox_created_at ON auth.email_outbox (created_at)")
    op.execute(TOKENS)
    op.execute("CREATE INDEX ix_email_token_user_id ON auth.email_token (user_id)")
    op.execute("CREATE INDEX ix_email_token_expires_at ON auth.email_token (expires_at)")


def downgrade() -> None:
    """What was not sent is lost."""
    op.execute("DROP TABLE auth.email_token")
    op.execute("DROP TABLE auth.email_outbox")
    op.execute("ALTER TABLE auth.user_account DROP COLUMN email_verified_at")
