"""Signing keys take over at a time of their own, so that they are known before they sign.

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
    """Those that are there sign already."""
    op.execute("ALTER TABLE auth.signing_key ADD COLUMN signs_from timestamptz NOT NULL DEFAULT now()")
    op.execute("UPDATE auth.signing_key SET signs_from = created_at")


def downgrade() -> None:
    """The newest signs."""
    op.execute("ALTER TABLE auth.signing_key DROP COLUMN signs_from")
