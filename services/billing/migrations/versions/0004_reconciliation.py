"""Where the reconciler is and what it found; and the transfers of a hold, by index.

Revision ID: 0004
Revises: 0003

The index is built a partition at a time, without a lock that writers wait for.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS billing.discrepancy (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        check_name TEXT NOT NULL,
        detail TEXT NOT NULL,
        found_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_discrepancy PRIMARY KEY (id)
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_discrepancy_wallet_id ON billing.discrepancy (wallet_id)",
    """
    CREATE TABLE IF NOT EXISTS billing.reconciliation (
        walk TEXT NOT NULL,
        after UUID,
        begun JSONB,
        cycle_started_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_reconciliation PRIMARY KEY (walk),
        CONSTRAINT ck_reconciliation_walk CHECK (walk IN ('wallets', 'holds'))
    )
    """,
    """
    CREATE OR REPLACE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.discrepancy
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()
    """,
)
PARTITIONS = """
    SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'billing.transfer'::regclass ORDER BY c.relname
    """
INDEX = "{how} {name} ON {table} (hold_id) WHERE hold_id IS NOT NULL"


def upgrade() -> None:
    """A migration that was interrupted is begun again: an index that was left invalid is built anew."""
    bind = op.get_bind()
    for statement in TABLES:
        bind.exec_driver_sql(statement)
    parent = INDEX.format(how="CREATE INDEX IF NOT EXISTS", name="ix_transfer_hold_id", table="ONLY billing.transfer")
    bind.exec_driver_sql(parent)
    partitions = [row[0] for row in bind.exec_driver_sql(PARTITIONS)]
    with op.get_context().autocommit_block():
        for partition in partitions:
            index, table = f"ix_{partition}_hold_id", f"billing_partition.{partition}"
            valid = f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('billing_partition.{index}')"
            if bind.exec_driver_sql(valid).scalar() is not True:
                bind.exec_driver_sql(f"DROP INDEX IF EXISTS billing_partition.{index}")
                bind.exec_driver_sql(INDEX.format(how="CREATE INDEX CONCURRENTLY", name=index, table=table))
            bind.exec_driver_sql(f"ALTER INDEX billing.ix_transfer_hold_id ATTACH PARTITION billing_partition.{index}")


def downgrade() -> None:
    """Drop them with what is in them."""
    op.execute("DROP INDEX billing.ix_transfer_hold_id")
    op.execute("DROP TABLE billing.reconciliation")
    op.execute("DROP TABLE billing.discrepancy")
