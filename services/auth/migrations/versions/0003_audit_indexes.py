"""The audit log is read by actor and by action as well, newest first.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the indexes. The log cannot be written while they are built: some seconds for 10⁶ lines."""
    op.execute("CREATE INDEX ix_audit_log_actor_user_id_id ON auth.audit_log (actor_user_id, id)")
    op.execute("CREATE INDEX ix_audit_log_action_id ON auth.audit_log (action, id)")


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP INDEX auth.ix_audit_log_actor_user_id_id")
    op.execute("DROP INDEX auth.ix_audit_log_action_id")
