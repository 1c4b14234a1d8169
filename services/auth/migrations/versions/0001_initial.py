"""People, organisations, sessions, API keys, audit log; the view that the gateway reads.

Revision ID: 0001
Revises: none
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ACCESS = (
    """
    CREATE TABLE auth.role (
        name text NOT NULL CONSTRAINT pk_role PRIMARY KEY,
        description text NOT NULL
    )
    """,
    """
    CREATE TABLE auth.permission (
        scope text NOT NULL CONSTRAINT pk_permission PRIMARY KEY,
        description text NOT NULL
    )
    """,
    """
    CREATE TABLE auth.role_permission (
        role text NOT NULL CONSTRAINT fk_role_permission_role REFERENCES auth.role (name),
        scope text NOT NULL CONSTRAINT fk_role_permission_scope REFERENCES auth.permission (scope),
        CONSTRAINT pk_role_permission PRIMARY KEY (role, scope)
    )
    """,
    """
    CREATE TABLE auth.plan (
        name text NOT NULL CONSTRAINT pk_plan PRIMARY KEY,
        description text NOT NULL,
        limits jsonb NOT NULL,
        CONSTRAINT ck_plan_limits_complete
            CHECK (limits ?& ARRAY['minute', 'hour', 'day', 'concurrency', 'tokens_per_minute'])
    )
    """,
)

PEOPLE = (
    """
    CREATE TABLE auth.user_account (
        id uuid NOT NULL CONSTRAINT pk_user_account PRIMARY KEY,
        username text NOT NULL,
        email text NOT NULL,
        password_hash text NOT NULL,
        status text NOT NULL DEFAULT 'active',
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT ck_user_account_status CHECK (status IN ('active', 'disabled'))
    )
    """,
    "CREATE UNIQUE INDEX uq_user_account_username_lower ON auth.user_account (lower(username))",
    "CREATE UNIQUE INDEX uq_user_account_email_lower ON auth.user_account (lower(email))",
    """
    CREATE TABLE auth.user_role (
        user_id uuid NOT NULL CONSTRAINT fk_user_role_user_id REFERENCES auth.user_account (id),
        role text NOT NULL CONSTRAINT fk_user_role_role REFERENCES auth.role (name),
        granted_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_user_role PRIMARY KEY (user_id, role)
    )
    """,
    """
    CREATE TABLE auth.organization (
        id uuid NOT NULL CONSTRAINT pk_organization PRIMARY KEY,
        name text NOT NULL,
        plan text NOT NULL DEFAULT 'default' CONSTRAINT fk_organization_plan REFERENCES auth.plan (name),
        personal boolean NOT NULL DEFAULT false,
        status text NOT NULL DEFAULT 'active',
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT ck_organization_status CHECK (status IN ('active', 'suspended'))
    )
    """,
    """
    CREATE TABLE auth.membership (
        org_id uuid NOT NULL CONSTRAINT fk_membership_org_id REFERENCES auth.organization (id),
        user_id uuid NOT NULL CONSTRAINT fk_membership_user_id REFERENCES auth.user_account (id),
        role text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_membership PRIMARY KEY (org_id, user_id),
        CONSTRAINT ck_membership_role CHECK (role IN ('owner', 'manager', 'member'))
    )
    """,
    "CREATE INDEX ix_membership_user_id ON auth.membership (user_id)",
)

SESSIONS = (
    """
    CREATE TABLE auth.session (
        id uuid NOT NULL CONSTRAINT pk_session PRIMARY KEY,
        user_id uuid NOT NULL CONSTRAINT fk_session_user_id REFERENCES auth.user_account (id),
        org_id uuid NOT NULL CONSTRAINT fk_session_org_id REFERENCES auth.organization (id),
        created_at timestamptz NOT NULL,
        last_used_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL,
        revoked_at timestamptz,
        revoked_reason text,
        user_agent text NOT NULL DEFAULT '',
        address inet
    )
    """,
    "CREATE INDEX ix_session_user_id_created_at ON auth.session (user_id, created_at)",
    "CREATE INDEX ix_session_expires_at ON auth.session (expires_at)",
    """
    CREATE TABLE auth.refresh_token (
        digest text NOT NULL CONSTRAINT pk_refresh_token PRIMARY KEY,
        session_id uuid NOT NULL
            CONSTRAINT fk_refresh_token_session_id REFERENCES auth.session (id) ON DELETE CASCADE,
        created_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL,
        used_at timestamptz
    )
    """,
    "CREATE INDEX ix_refresh_token_session_id ON auth.refresh_token (session_id)",
    """
    CREATE TABLE auth.signing_key (
        kid text NOT NULL CONSTRAINT pk_signing_key PRIMARY KEY,
        public_jwk jsonb NOT NULL,
        private_key bytea NOT NULL,
        created_at timestamptz NOT NULL,
        retired_at timestamptz
    )
    """,
)

KEYS = (
    """
    CREATE TABLE auth.api_key (
        id uuid NOT NULL CONSTRAINT pk_api_key PRIMARY KEY,
        org_id uuid NOT NULL CONSTRAINT fk_api_key_org_id REFERENCES auth.organization (id),
        user_id uuid NOT NULL CONSTRAINT fk_api_key_user_id REFERENCES auth.user_account (id),
        name text NOT NULL,
        prefix text NOT NULL,
        digest text NOT NULL,
        pepper integer NOT NULL,
        scopes text[] NOT NULL,
        models text[],
        limits jsonb NOT NULL DEFAULT '{}'::jsonb,
        limit_id uuid NOT NULL,
        version bigint NOT NULL DEFAULT 1,
        status text NOT NULL DEFAULT 'active',
        expires_at timestamptz,
        created_at timestamptz NOT NULL,
        revoked_at timestamptz,
        last_used_at timestamptz,
        CONSTRAINT ck_api_key_status CHECK (status IN ('active', 'revoked')),
        CONSTRAINT ck_api_key_revoked_at CHECK ((status = 'revoked') = (revoked_at IS NOT NULL)),
        CONSTRAINT ck_api_key_version CHECK (version > 0),
        CONSTRAINT ck_api_key_digest CHECK (digest ~ '^[0-9a-f]{64}$')
    )
    """,
    "CREATE UNIQUE INDEX uq_api_key_digest ON auth.api_key (digest)",
    "CREATE INDEX ix_api_key_org_id_id ON auth.api_key (org_id, id)",
    "CREATE INDEX ix_api_key_user_id ON auth.api_key (user_id)",
    """
    CREATE TABLE auth.key_outbox (
        id bigint NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_key_outbox PRIMARY KEY,
        key_id uuid NOT NULL CONSTRAINT fk_key_outbox_key_id REFERENCES auth.api_key (id),
        org_id uuid NOT NULL,
        digest text NOT NULL,
        version bigint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # What a gateway needs to admit a request. Its columns are a contract: add, never change the meaning of one.
    """
    CREATE VIEW auth.key_view AS
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
        k.expires_at
    FROM auth.api_key k
    JOIN auth.user_account u ON u.id = k.user_id
    JOIN auth.organization o ON o.id = k.org_id
    JOIN auth.plan p ON p.name = o.plan
    """,
)

AUDIT = (
    """
    CREATE TABLE auth.audit_log (
        id uuid NOT NULL CONSTRAINT pk_audit_log PRIMARY KEY,
        at timestamptz NOT NULL,
        action text NOT NULL,
        actor_user_id uuid,
        actor_key_id uuid,
        org_id uuid,
        target_type text NOT NULL,
        target_id uuid,
        request_id text NOT NULL DEFAULT '',
        address inet,
        details jsonb NOT NULL DEFAULT '{}'::jsonb
    )
    """,
    "CREATE INDEX ix_audit_log_org_id_id ON auth.audit_log (org_id, id)",
    """
    CREATE FUNCTION auth.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END
    $$
    """,
    """
    CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON auth.audit_log
        FOR EACH STATEMENT EXECUTE FUNCTION auth.refuse_change()
    """,
)

SEEDS = (
    """
    INSERT INTO auth.role (name, description) VALUES
        ('user', 'A customer: own keys, own wallet, own models'),
        ('operator', 'Runs the installation: limits, revocation, audit'),
        ('admin', 'Everything, other operators included')
    """,
    """
    INSERT INTO auth.permission (scope, description) VALUES
        ('chat', 'Chat completions'),
        ('models', 'List models'),
        ('inference', 'Embeddings and other inference'),
        ('billing:read', 'Read wallet, transactions, usage'),
        ('billing:write', 'Top up'),
        ('keys:read', 'List API keys'),
        ('keys:write', 'Create, change and revoke API keys'),
        ('admin', 'Administrative addresses, as far as the roles of the owner go'),
        ('*', 'Every scope')
    """,
    """
    INSERT INTO auth.role_permission (role, scope)
    SELECT r.name, p.scope FROM auth.role r CROSS JOIN auth.permission p
    WHERE CASE r.name
        WHEN 'user' THEN p.scope NOT IN ('admin', '*')
        WHEN 'operator' THEN p.scope <> '*'
        ELSE true
    END
    """,
    """
    INSERT INTO auth.plan (name, description, limits) VALUES
        ('default', 'What a new organisation gets',
         '{"minute": 60, "hour": 1000, "day": 10000, "concurrency": 16, "tokens_per_minute": 100000}')
    """,
)

TABLES = (
    *("audit_log", "key_outbox", "api_key", "signing_key", "refresh_token", "session", "membership", "organization"),
    *("user_role", "user_account", "plan", "role_permission", "permission", "role"),
)


def upgrade() -> None:
    """Make everything, with the roles, permissions and the plan that a new installation starts with."""
    for statement in (*ACCESS, *PEOPLE, *SESSIONS, *KEYS, *AUDIT, *SEEDS):
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Drop everything. There is no way back for the data."""
    op.execute("DROP VIEW auth.key_view")
    for table in TABLES:
        op.execute(f"DROP TABLE auth.{table}")
    op.execute("DROP FUNCTION auth.refuse_change()")
