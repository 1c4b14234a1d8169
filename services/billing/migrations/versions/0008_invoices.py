"""Invoices and their lines, written once.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE billing.invoice (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        month DATE NOT NULL,
        after_seq BIGINT NOT NULL,
        until_seq BIGINT NOT NULL,
        opening BIGINT NOT NULL,
        closing BIGINT NOT NULL,
        total BIGINT NOT NULL,
        issued_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_invoice PRIMARY KEY (id),
        CONSTRAINT ck_invoice_range CHECK (0 <= after_seq AND after_seq <= until_seq),
        CONSTRAINT uq_invoice_wallet_id_month UNIQUE (wallet_id, month),
        CONSTRAINT fk_invoice_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id)
    )
    """,
    """
    CREATE TABLE billing.invoice_line (
        invoice_id UUID NOT NULL,
        position INTEGER NOT NULL,
        kind TEXT NOT NULL,
        source TEXT,
        model TEXT,
        price_id UUID,
        count BIGINT NOT NULL,
        input_tokens BIGINT NOT NULL,
        cached_input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        amount BIGINT NOT NULL,
        effect BIGINT NOT NULL,
        CONSTRAINT pk_invoice_line PRIMARY KEY (invoice_id, position),
        CONSTRAINT ck_invoice_line_amount CHECK (amount > 0),
        CONSTRAINT ck_invoice_line_effect CHECK (effect BETWEEN -amount AND amount),
        CONSTRAINT fk_invoice_line_invoice_id FOREIGN KEY(invoice_id) REFERENCES billing.invoice (id),
        CONSTRAINT fk_invoice_line_price_id FOREIGN KEY(price_id) REFERENCES billing.price (id)
    )
    """,
)
APPEND_ONLY = ("invoice", "invoice_line")


def upgrade() -> None:
    """Make the tables, with the triggers that keep them as they were written."""
    for statement in TABLES:
        op.get_bind().exec_driver_sql(statement)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.{table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()"
        )


def downgrade() -> None:
    """Drop them with what is in them."""
    for table in ("invoice_line", "invoice"):
        op.execute(f"DROP TABLE billing.{table}")
