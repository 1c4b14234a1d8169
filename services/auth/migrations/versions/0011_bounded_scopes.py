"""A key's scopes are within its owner's as they are now; users are found by the beginning of name or address.

Revision ID: 0011
Revises: 0010

The indexes are built without a lock that anybody waits for.
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# As in 0007 but for the scopes: those of the key that its owner holds; `*` is all that the owner holds. A plain member
# does not write to the organisation's money; a service account, whose keys managers make, does.
HELD = """ARRAY(
            SELECT s.scope
            FROM unnest(
                CASE WHEN '*' = ANY (k.scopes) AND NOT '*' = ANY (held.scopes) THEN held.scopes ELSE k.scopes END
            ) WITH ORDINALITY AS s (scope, place)
            WHERE (s.scope = ANY (held.scopes) OR '*' = ANY (held.scopes))
              AND NOT (s.scope = 'billing:write' AND u.kind = 'person' AND EXISTS (
                  SELECT FROM auth.membership m
                  WHERE m.org_id = k.org_id AND m.user_id = k.user_id AND m.role = 'member'
              ))
            ORDER BY s.place
        ) AS scopes"""
HOLDER = """
    CROSS JOIN LATERAL (
        SELECT ARRAY(
            SELECT DISTINCT rp.scope FROM auth.user_role r JOIN auth.role_permission rp ON rp.role = r.role
            WHERE r.user_id = k.user_id ORDER BY rp.scope
        ) AS scopes
    ) held"""
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
        {scopes},
        k.models,
        p.limits || k.limits AS limits,
        k.version,
        CASE WHEN k.status = 'active' AND u.status = 'active' AND o.status = 'active'
              AND EXISTS (SELECT FROM auth.membership m WHERE m.org_id = k.org_id AND m.user_id = k.user_id)
             THEN 'active' ELSE 'revoked' END AS status,
        k.expires_at,
        k.allowed_addresses
    FROM auth.api_key k
    JOIN auth.user_account u ON u.id = k.user_id
    JOIN auth.organization o ON o.id = k.org_id
    JOIN auth.plan p ON p.name = o.plan{holder}
"""
PREFIXES = ("username", "email")


def upgrade() -> None:
    """A migration that was interrupted is begun again: an index that was left invalid is built anew."""
    bind = op.get_bind()
    bind.exec_driver_sql(KEY_VIEW.format(scopes=HELD, holder=HOLDER))
    with op.get_context().autocommit_block():
        for column in PREFIXES:
            name = f"ix_user_account_{column}_prefix"
            valid = f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('auth.{name}')"
            if bind.exec_driver_sql(valid).scalar() is not True:
                bind.exec_driver_sql(f"DROP INDEX IF EXISTS auth.{name}")
                bind.exec_driver_sql(
                    f"CREATE INDEX CONCURRENTLY {name} ON auth.user_account (lower({column}) text_pattern_ops)"
                )


def downgrade() -> None:
    """As it was."""
    for column in PREFIXES:
        op.execute(f"DROP INDEX auth.ix_user_account_{column}_prefix")
    op.execute(KEY_VIEW.format(scopes="k.scopes", holder=""))
