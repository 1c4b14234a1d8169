"""Sessions of browsers; sign-in through OpenID providers.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

EXTERNAL_IDENTITY = """
    CREATE TABLE auth.external_identity (
        issuer text NOT NULL,
        subject text NOT NULL,
        user_id uuid NOT NULL CONSTRAINT fk_external_identity_user_id REFERENCES auth.user_account (id),
        created_at timestamptz NOT NULL,
        CONSTRAINT pk_external_identity PRIMARY KEY (issuer, subject)
    )
"""
OIDC_FLOW = """
    CREATE TABLE auth.oidc_flow (
        digest text NOT NULL CONSTRAINT pk_oidc_flow PRIMARY KEY,
        provider text NOT NULL,
        nonce text NOT NULL,
        verifier text NOT NULL,
        return_to text NOT NULL,
        expires_at timestamptz NOT NULL
    )
"""


def upgrade() -> None:
    """The new column has a constant default, so no row is rewritten."""
    op.execute("ALTER TABLE auth.session ADD COLUMN browser boolean NOT NULL DEFAULT false")
    op.execute(EXTERNAL_IDENTITY)
    op.execute("CREATE INDEX ix_external_identity_user_id ON auth.external_identity (user_id)")
    op.execute(OIDC_FLOW)
    op.execute("CREATE INDEX ix_oidc_flow_expires_at ON auth.oidc_flow (expires_at)")


def downgrade() -> None:
    """Who signs in through a provider only cannot any more."""
    op.execute("DROP TABLE auth.oidc_flow")
    op.execute("DROP TABLE auth.external_identity")
    op.execute("ALTER TABLE auth.session DROP COLUMN browser")
