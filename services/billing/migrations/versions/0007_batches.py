"""What the batching writer needs: shards with epochs, versions of wallets and prices, the day's sums, cheaper guards.

Revision ID: 0007
Revises: 0006

Foreign keys of what is inserted by the thousand go: each looked up, and locked, a row that the writer has just read or
made; `verify` looks for the orphans that they kept out (docs/decisions/0018).
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

HOT_KEYS = (
    ("hold", "wallet_id", "wallet"),
    ("hold", "price_id", "price"),
    ("hold_slice", "hold_id", "hold"),
    ("hold_slice", "account_id", "account"),
    ("open_hold", "hold_id", "hold"),
    ("hold_resolution", "hold_id", "hold"),
    ("transfer", "wallet_id", "wallet"),
    ("transfer", "debit_account", "account"),
    ("transfer", "credit_account", "account"),
    ("usage", "hold_id", "hold"),
    ("usage", "price_id", "price"),
)
CODES = ("grant", "usage", "late", "receivable", "repayment", "expiry")
NEW_CODES = ("charge", "refund")

SHARDS = (
    """
    CREATE TABLE billing.shard (
        id SMALLINT NOT NULL,
        epoch BIGINT NOT NULL,
        leader TEXT NOT NULL,
        updated_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_shard PRIMARY KEY (id),
        CONSTRAINT ck_shard_id CHECK (id BETWEEN 0 AND 255)
    )
    """,
)

VERSIONS = (
    "ALTER TABLE billing.wallet ADD COLUMN version BIGINT DEFAULT 0 NOT NULL",
    """
    CREATE FUNCTION billing.new_wallet_version() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.version := OLD.version + 1;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER new_version BEFORE UPDATE OF frozen_at ON billing.wallet
    FOR EACH ROW WHEN ((OLD.frozen_at IS NULL) <> (NEW.frozen_at IS NULL))
    EXECUTE FUNCTION billing.new_wallet_version()
    """,
    """
    CREATE FUNCTION billing.new_version_of_budget() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        UPDATE billing.wallet SET version = version + 1 WHERE id = coalesce(NEW.wallet_id, OLD.wallet_id);
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER new_version AFTER INSERT OR UPDATE OR DELETE ON billing.budget
    FOR EACH ROW EXECUTE FUNCTION billing.new_version_of_budget()
    """,
    """
    CREATE TABLE billing.price_generation (
        id SMALLINT NOT NULL,
        generation BIGINT NOT NULL,
        CONSTRAINT pk_price_generation PRIMARY KEY (id),
        CONSTRAINT ck_price_generation_id CHECK (id = 1)
    )
    """,
    "INSERT INTO billing.price_generation VALUES (1, 1)",
    """
    CREATE FUNCTION billing.new_price_generation() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        UPDATE billing.price_generation SET generation = generation + 1;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER new_generation AFTER INSERT OR UPDATE ON billing.price
    FOR EACH STATEMENT EXECUTE FUNCTION billing.new_price_generation()
    """,
)

SUMS = (
    """
    CREATE TABLE billing.usage_day (
        wallet_id UUID NOT NULL,
        day DATE NOT NULL,
        model TEXT NOT NULL,
        key_id UUID,
        user_id UUID,
        requests BIGINT NOT NULL,
        input_tokens BIGINT NOT NULL,
        cached_input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        cost BIGINT NOT NULL,
        CONSTRAINT uq_usage_day_wallet_id_day_model_key_id_user_id
            UNIQUE NULLS NOT DISTINCT (wallet_id, day, model, key_id, user_id),
        CONSTRAINT ck_usage_day_figures CHECK (
            requests >= 0 AND input_tokens >= 0 AND cached_input_tokens >= 0 AND output_tokens >= 0 AND cost >= 0
        )
    ) WITH (fillfactor = 50)
    """,
    """
    INSERT INTO billing.usage_day
    SELECT wallet_id, (created_at AT TIME ZONE 'UTC')::date, model, key_id, user_id, count(*) FILTER (WHERE part = 0),
        sum(input_tokens), sum(cached_input_tokens), sum(output_tokens), sum(cost)
    FROM billing.usage GROUP BY 1, 2, 3, 4, 5
    """,
)

# A condition of the trigger costs a comparison; the function, as before, a call for each row.
GUARDS = (
    "DROP TRIGGER keep_counters_monotonic ON billing.account",
    """
    CREATE TRIGGER keep_counters_monotonic BEFORE UPDATE ON billing.account FOR EACH ROW
    WHEN (NEW.debits_posted < OLD.debits_posted OR NEW.credits_posted < OLD.credits_posted
        OR NEW.id <> OLD.id OR NEW.wallet_id <> OLD.wallet_id OR NEW.kind <> OLD.kind)
    EXECUTE FUNCTION billing.keep_counters_monotonic()
    """,
)


def _codes(codes: tuple[str, ...]) -> tuple[str, ...]:
    listed = ", ".join(f"'{code}'" for code in codes)
    return (
        "ALTER TABLE billing.transfer DROP CONSTRAINT ck_transfer_code",
        f"ALTER TABLE billing.transfer ADD CONSTRAINT ck_transfer_code CHECK (code IN ({listed}))",
    )


def _execute(*statements: str) -> None:
    for statement in statements:
        op.get_bind().exec_driver_sql(statement)


def upgrade() -> None:
    """Make what is missing, count what was used before by day, and drop the foreign keys of the hot tables."""
    _execute("LOCK TABLE billing.wallet IN EXCLUSIVE MODE")
    for table, column, _ in HOT_KEYS:
        _execute(f"ALTER TABLE billing.{table} DROP CONSTRAINT fk_{table}_{column}")
    _execute(*_codes((*CODES, *NEW_CODES)), *SHARDS, *VERSIONS, *SUMS, *GUARDS)


def downgrade() -> None:
    """Drop them, and bring the foreign keys back. Transfers of the new codes stay in the way of their constraint."""
    _execute(
        "DROP TRIGGER keep_counters_monotonic ON billing.account",
        "CREATE TRIGGER keep_counters_monotonic BEFORE UPDATE ON billing.account "
        "FOR EACH ROW EXECUTE FUNCTION billing.keep_counters_monotonic()",
        "DROP TABLE billing.usage_day",
        "DROP TRIGGER new_generation ON billing.price",
        "DROP FUNCTION billing.new_price_generation()",
        "DROP TABLE billing.price_generation",
        "DROP TRIGGER new_version ON billing.budget",
        "DROP FUNCTION billing.new_version_of_budget()",
        "DROP TRIGGER new_version ON billing.wallet",
        "DROP FUNCTION billing.new_wallet_version()",
        "ALTER TABLE billing.wallet DROP COLUMN version",
        "DROP TABLE billing.shard",
        *_codes(CODES),
    )
    for table, column, target in HOT_KEYS:
        _execute(
            f"ALTER TABLE billing.{table} ADD CONSTRAINT fk_{table}_{column} "
            f"FOREIGN KEY({column}) REFERENCES billing.{target} (id)"
        )
