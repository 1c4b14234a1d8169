"""Invitations to organisations; the membership `manager` is called `admin`.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table, and rename the role."""
    _rename_role("manager", "admin")
    op.execute(
        """
        CREATE TABLE auth.invitation (
            id uuid NOT NULL CONSTRAINT pk_invitation PRIMARY KEY,
            org_id uuid NOT NULL CONSTRAINT fk_invitation_org_id REFERENCES auth.organization (id),
            role text NOT NULL,
            digest text NOT NULL,
            invited_by uuid NOT NULL CONSTRAINT fk_invitation_invited_by REFERENCES auth.user_account (id),
            created_at timestamptz NOT NULL,
            expires_at timestamptz NOT NULL,
            CONSTRAINT ck_invitation_role CHECK (role IN ('owner', 'admin', 'member'))
        )
        """
    )
    op.execute("CREATE UNIQUE INDEX uq_invitation_digest ON auth.invitation (digest)")
    op.execute("CREATE INDEX ix_invitation_org_id_id ON auth.invitation (org_id, id)")


def downgrade() -> None:
    """Invitations are lost."""
    op.execute("DROP TABLE auth.invitation")
    _rename_role("admin", "manager")


def _rename_role(old: str, new: str) -> None:
    op.execute("ALTER TABLE auth.membership DROP CONSTRAINT ck_membership_role")
    op.execute(f"UPDATE auth.membership SET role = '{new}' WHERE role = '{old}'")
    op.execute(
        f"ALTER TABLE auth.membership ADD CONSTRAINT ck_membership_role CHECK (role IN ('owner', '{new}', 'member'))"
    )
