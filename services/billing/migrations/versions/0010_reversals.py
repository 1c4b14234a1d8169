"""Charges count for budgets, what was done by hand keeps its reason, and money that went back takes its credits along.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

CODES = ("grant", "usage", "late", "receivable", "repayment", "expiry", "charge", "refund")

TABLES = (
    """
    CREATE TABLE billing.audit (
        wallet_id UUID NOT NULL,
        op_id UUID NOT NULL,
        kind TEXT NOT NULL,
        amount BIGINT,
        frozen BOOLEAN,
        reason TEXT NOT NULL,
        actor TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_audit PRIMARY KEY (wallet_id, op_id),
        CONSTRAINT ck_audit_kind CHECK (kind IN ('charge', 'refund', 'take_back', 'freeze')),
        CONSTRAINT ck_audit_subject CHECK ((kind = 'freeze') = (frozen IS NOT NULL AND amount IS NULL))
    )
    """,
    "CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.audit "
    "FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()",
    """
    CREATE TABLE billing.charge_day (
        wallet_id UUID NOT NULL,
        day DATE NOT NULL,
        key_id UUID,
        user_id UUID,
        amount BIGINT NOT NULL,
        CONSTRAINT uq_charge_day_wallet_id_day_key_id_user_id UNIQUE NULLS NOT DISTINCT
            (wallet_id, day, key_id, user_id),
        CONSTRAINT ck_charge_day_amount CHECK (amount > 0)
    )
    """,
)


def _codes(codes: tuple[str, ...]) -> None:
    listed = ", ".join(f"'{code}'" for code in codes)
    op.execute("ALTER TABLE billing.transfer DROP CONSTRAINT ck_transfer_code")
    op.execute(f"ALTER TABLE billing.transfer ADD CONSTRAINT ck_transfer_code CHECK (code IN ({listed}))")


def upgrade() -> None:
    """Charges of before are nobody's and have no reason: whose they were and what for was not kept."""
    op.execute("LOCK TABLE billing.wallet IN EXCLUSIVE MODE")
    _codes((*CODES, "reversal"))
    for statement in TABLES:
        op.execute(statement)
    op.execute("""
        INSERT INTO billing.charge_day
        SELECT wallet_id, (booked_at AT TIME ZONE 'UTC')::date, NULL, NULL, sum(amount)
        FROM billing.transfer WHERE code = 'charge' GROUP BY 1, 2
        """)


def downgrade() -> None:
    """Drop them with what is in them. Reversals stay in the way of the constraint."""
    op.execute("LOCK TABLE billing.wallet IN EXCLUSIVE MODE")
    for table in ("audit", "charge_day"):
        op.execute(f"DROP TABLE billing.{table}")
    _codes(CODES)
