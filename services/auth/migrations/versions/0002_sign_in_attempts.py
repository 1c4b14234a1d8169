"""Attempts to sign in, for the back-off after failed ones.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table and the index by which old rows are found."""
    op.execute(
        """
        CREATE TABLE auth.sign_in_attempt (
            subject text NOT NULL CONSTRAINT pk_sign_in_attempt PRIMARY KEY,
            failures integer NOT NULL,
            since timestamptz NOT NULL,
            blocked_until timestamptz,
            CONSTRAINT ck_sign_in_attempt_failures CHECK (failures >= 0)
        )
        """
    )
    op.execute("CREATE INDEX ix_sign_in_attempt_since ON auth.sign_in_attempt (since)")


def downgrade() -> None:
    """Forget all attempts."""
    op.execute("DROP TABLE auth.sign_in_attempt")
