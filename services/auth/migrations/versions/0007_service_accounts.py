"""Service accounts; keys bound to addresses; what keys were used for, by day.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# As in 0001, and allowed_addresses at its end: a view's columns stay in their order.
KEY_VIEW = """
    CREATE OR REPLACE VIEW auth.key_view AS
    SELECT
        k.digest,
        k.pepper,
        k.id AS key_id,
        k.limit_id,
        k.org_id,
        k.user_id,
        o.plan,
        ARRAY(SELECT r.role FROM auth.user_role r WHERE r.user_id = k.user_id ORDER BY r.role) AS roles,
        k.scopes,
        k.models,
        p.limits || k.limits AS limits,
        k.version,
        CASE WHEN k.status = 'active' AND u.status = 'active' AND o.status = 'active'
              AND EXISTS (SELECT FROM auth.membership m WHERE m.org_id = k.org_id AND m.user_id = k.user_id)
             THEN 'active' ELSE 'revoked' END AS status,
        k.expires_at{allowed_addresses}
    FROM auth.api_key k
    JOIN auth.user_account u ON u.id = k.user_id
    JOIN auth.organization o ON o.id = k.org_id
    JOIN auth.plan p ON p.name = o.plan
"""
KEY_USAGE = """
    CREATE TABLE auth.key_usage (
        key_id uuid NOT NULL CONSTRAINT fk_key_usage_key_id REFERENCES auth.api_key (id),
        day date NOT NULL,
        requests bigint NOT NULL,
        client_errors bigint NOT NULL,
        server_errors bigint NOT NULL,
        bytes_in bigint NOT NULL,
        bytes_out bigint NOT NULL,
        CONSTRAINT pk_key_usage PRIMARY KEY (key_id, day)
    )
"""


def upgrade() -> None:
    """No row is rewritten: the new columns are null, or have a constant default."""
    op.execute("ALTER TABLE auth.api_key ADD COLUMN allowed_addresses text[]")
    op.execute(KEY_VIEW.format(allowed_addresses=",\n        k.allowed_addresses"))
    op.execute(KEY_USAGE)
    op.execute("CREATE INDEX ix_key_usage_day ON auth.key_usage (day)")
    op.execute("ALTER TABLE auth.user_account ALTER COLUMN email DROP NOT NULL")
    op.execute("ALTER TABLE auth.user_account ADD COLUMN kind text NOT NULL DEFAULT 'person'")
    op.execute("ALTER TABLE auth.user_account ADD COLUMN display_name text")
    op.execute(
        """
        ALTER TABLE auth.user_account ADD CONSTRAINT ck_user_account_kind CHECK (
            (kind = 'person' AND email IS NOT NULL) OR (kind = 'service' AND email IS NULL AND display_name IS NOT NULL)
        )
        """
    )


def downgrade() -> None:
    """Service accounts must be gone before."""
    op.execute("ALTER TABLE auth.user_account DROP CONSTRAINT ck_user_account_kind")
    op.execute("ALTER TABLE auth.user_account DROP COLUMN display_name")
    op.execute("ALTER TABLE auth.user_account DROP COLUMN kind")
    op.execute("ALTER TABLE auth.user_account ALTER COLUMN email SET NOT NULL")
    op.execute("DROP TABLE auth.key_usage")
    op.execute("DROP VIEW auth.key_view")
    op.execute(KEY_VIEW.format(allowed_addresses=""))
    op.execute("ALTER TABLE auth.api_key DROP COLUMN allowed_addresses")
