"""Sessions have versions, which gateways ask for as they do for those of keys; outboxes keep what they delivered.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# What a gateway needs to believe an access token. As with key_view: add columns, never change the meaning of one.
SESSION_VIEW = """
    CREATE VIEW auth.session_view AS
    SELECT
        s.id AS session_id,
        s.org_id,
        s.user_id,
        s.version,
        CASE WHEN s.revoked_at IS NULL AND u.status = 'active' AND o.status = 'active'
              AND EXISTS (SELECT FROM auth.membership m WHERE m.org_id = s.org_id AND m.user_id = s.user_id)
             THEN 'active' ELSE 'revoked' END AS status,
        s.expires_at
    FROM auth.session s
    JOIN auth.user_account u ON u.id = s.user_id
    JOIN auth.organization o ON o.id = s.org_id
"""
SESSION_OUTBOX = """
    CREATE TABLE auth.session_outbox (
        id bigint NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_session_outbox PRIMARY KEY,
        session_id uuid NOT NULL
            CONSTRAINT fk_session_outbox_session_id REFERENCES auth.session (id) ON DELETE CASCADE,
        org_id uuid NOT NULL,
        version bigint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        delivered_at timestamptz
    )
"""


def upgrade() -> None:
    """The new column has a constant default, so no row is rewritten; the outbox is small."""
    op.execute("ALTER TABLE auth.session ADD COLUMN version bigint NOT NULL DEFAULT 1")
    op.execute("ALTER TABLE auth.key_outbox ADD COLUMN delivered_at timestamptz")
    op.execute(SESSION_OUTBOX)
    op.execute("CREATE INDEX ix_session_outbox_session_id ON auth.session_outbox (session_id)")
    for table in ("key_outbox", "session_outbox"):
        op.execute(f"CREATE INDEX ix_{table}_pending ON auth.{table} (id) WHERE delivered_at IS NULL")
        op.execute(f"CREATE INDEX ix_{table}_delivered_at ON auth.{table} (delivered_at)")
    op.execute(SESSION_VIEW)


def downgrade() -> None:
    """Gateways of this version refuse access tokens then."""
    op.execute("DROP VIEW auth.session_view")
    op.execute("DROP TABLE auth.session_outbox")
    op.execute("DELETE FROM auth.key_outbox WHERE delivered_at IS NOT NULL")
    op.execute("DROP INDEX auth.ix_key_outbox_pending")
    op.execute("ALTER TABLE auth.key_outbox DROP COLUMN delivered_at")
    op.execute("ALTER TABLE auth.session DROP COLUMN version")
