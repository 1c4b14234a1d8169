"""Budgets: what a key or a member may spend in a day or a month.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BUDGET = """
    CREATE TABLE billing.budget (
        wallet_id UUID NOT NULL,
        subject TEXT NOT NULL,
        subject_id UUID NOT NULL,
        period TEXT NOT NULL,
        amount BIGINT NOT NULL,
        updated_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_budget PRIMARY KEY (wallet_id, subject, subject_id, period),
        CONSTRAINT ck_budget_subject CHECK (subject IN ('key', 'member')),
        CONSTRAINT ck_budget_period CHECK (period IN ('day', 'month')),
        CONSTRAINT ck_budget_amount CHECK (amount >= 0),
        CONSTRAINT fk_budget_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id)
    )
    """


def upgrade() -> None:
    """Make the table."""
    op.execute(BUDGET)


def downgrade() -> None:
    """Drop it with what is in it."""
    op.execute("DROP TABLE billing.budget")
