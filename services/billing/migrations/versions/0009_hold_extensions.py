"""Holds that are extended while they are open.

Revision ID: 0009
Revises: 0008

An extension may reserve more of a grant that a slice of the hold names already: that they were unique goes.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table, with the trigger that keeps it as it was written."""
    op.execute("ALTER TABLE billing.hold_slice DROP CONSTRAINT uq_hold_slice_hold_id_account_id")
    op.execute("""
        CREATE TABLE billing.hold_extension (
            hold_id UUID NOT NULL,
            number INTEGER NOT NULL,
            op_id UUID NOT NULL,
            output_tokens BIGINT NOT NULL,
            amount BIGINT NOT NULL,
            created_at TIMESTAMPTZ NOT NULL,
            CONSTRAINT pk_hold_extension PRIMARY KEY (hold_id, number),
            CONSTRAINT ck_hold_extension_number CHECK (number > 0),
            CONSTRAINT ck_hold_extension_amount CHECK (amount >= 0)
        )
        """)
    op.execute(
        "CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.hold_extension "
        "FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()"
    )


def downgrade() -> None:
    """Drop it with what is in it. Extended holds are in the way of the constraint."""
    op.execute("DROP TABLE billing.hold_extension")
    op.execute(
        "ALTER TABLE billing.hold_slice ADD CONSTRAINT uq_hold_slice_hold_id_account_id UNIQUE (hold_id, account_id)"
    )
