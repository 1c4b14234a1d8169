"""Messages to an address are counted whatever the case of its letters: a mailbox has one limit, not two to the 20th.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The table holds what is due and an hour of what was sent."""
    op.execute("CREATE INDEX ix_email_outbox_address_lower ON auth.email_outbox (lower(address), created_at)")
    op.execute("DROP INDEX auth.ix_email_outbox_address_created_at")


def downgrade() -> None:
    """As before."""
    op.execute("CREATE INDEX ix_email_outbox_address_created_at ON auth.email_outbox (address, created_at)")
    op.execute("DROP INDEX auth.ix_email_outbox_address_lower")
