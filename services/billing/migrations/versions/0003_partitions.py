"""The tables that grow for ever become partitioned, in place: transfer and usage by month, op by hash of its tenant.

Revision ID: 0003
Revises: 0002

The service may run meanwhile. What takes long takes no lock that writers wait for; each table is exchanged in a
transaction of its own that only touches the catalogue. A migration that was interrupted is begun again.

Partitions live in schema `billing_partition`, where the service's role may not even look: it reaches rows through the
parents, and makes the next months' partitions through `billing.make_partitions`, which runs as the owner.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OP_PARTITIONS = 16
# Whoever writes locks a wallet first: with this gate shut, nobody holds one table and waits for another.
SHUT_GATE = ("SET LOCAL lock_timeout = '5s'", "LOCK TABLE billing.wallet IN EXCLUSIVE MODE")

FUNCTIONS = (
    """
    CREATE OR REPLACE FUNCTION billing.first_uuid7(at timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE STRICT
    RETURN (lpad(to_hex((extract(epoch FROM at) * 1000)::int8), 12, '0') || '70008000000000000000')::uuid
    """,
    """
    CREATE OR REPLACE FUNCTION billing.add_partition(
        parent text, key text, since timestamptz, until timestamptz
    ) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        name text := parent || to_char(since, '_YYYY_MM');
        rest text := parent || '_default';
        low uuid := billing.first_uuid7(since);
        high uuid := billing.first_uuid7(until);
        has_strays boolean;
    BEGIN
        EXECUTE format('CREATE TABLE billing_partition.%I (LIKE billing.%I INCLUDING ALL)', name, parent);
        IF parent = 'transfer' THEN
            EXECUTE format('ALTER TABLE billing_partition.%I ADD UNIQUE (wallet_id, wallet_seq)', name);
        END IF;
        EXECUTE format('CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON billing_partition.%I '
            'FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()', name);
        EXECUTE format('SELECT EXISTS (SELECT FROM billing_partition.%I WHERE %I >= $1 AND %2$I < $2)', rest, key)
            INTO has_strays USING low, high;
        IF has_strays THEN
            -- The lock that this takes keeps others from adding to them until the partition is there.
            EXECUTE format('ALTER TABLE billing_partition.%I DISABLE TRIGGER refuse_change', rest);
            EXECUTE format('WITH strays AS (DELETE FROM billing_partition.%I WHERE %I >= $1 AND %2$I < $2 RETURNING *) '
                'INSERT INTO billing_partition.%I SELECT * FROM strays', rest, key, name) USING low, high;
            EXECUTE format('ALTER TABLE billing_partition.%I ENABLE TRIGGER refuse_change', rest);
        END IF;
        -- Attaching locks the parent less than CREATE TABLE … PARTITION OF does.
        EXECUTE format('ALTER TABLE billing.%I ATTACH PARTITION billing_partition.%I FOR VALUES FROM (%L) TO (%L)',
            parent, name, low, high);
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION billing.make_partitions(months integer) RETURNS TABLE (horizon timestamptz, strays int8)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET lock_timeout = '2s' AS $$
    DECLARE
        parent text;
        key text;
        ends timestamptz;
        found int8;
        goal timestamptz := date_trunc('month', clock_timestamp()) + make_interval(months => months + 1);
    BEGIN
        IF months NOT BETWEEN 1 AND 24 THEN
            RAISE EXCEPTION 'months is from 1 to 24' USING ERRCODE = 'invalid_parameter_value';
        END IF;
        PERFORM pg_advisory_xact_lock(hashtext('billing.make_partitions'));
        horizon := 'infinity';
        strays := 0;
        FOR parent, key IN VALUES ('transfer', 'id'), ('usage', 'hold_id') LOOP
            SELECT max(uuid_extract_timestamp(
                substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \\(''([0-9a-f-]{36})''\\)')::uuid))
            INTO ends FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = format('billing.%I', parent)::regclass;
            -- A clock that jumped years ahead makes no more than this at a time.
            FOR made IN 0..months LOOP
                EXIT WHEN ends >= goal;
                -- Whoever writes locks a wallet first: with this gate shut, no writer waits while we wait for it.
                LOCK TABLE billing.wallet IN EXCLUSIVE MODE;
                PERFORM billing.add_partition(parent, key, ends, ends + interval '1 month');
                ends := ends + interval '1 month';
            END LOOP;
            EXECUTE format('SELECT count(*) FROM (SELECT FROM billing_partition.%I LIMIT 10000) found',
                parent || '_default') INTO found;
            horizon := least(horizon, ends);
            strays := strays + found;
        END LOOP;
        RETURN NEXT;
    END $$
    """,
)

TRANSFER = """
    CREATE TABLE billing.transfer (
        id UUID NOT NULL,
        op_id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        wallet_seq BIGINT NOT NULL,
        debit_account UUID NOT NULL,
        credit_account UUID NOT NULL,
        amount BIGINT NOT NULL,
        code TEXT NOT NULL,
        hold_id UUID,
        balance_after BIGINT NOT NULL,
        effective_at TIMESTAMPTZ NOT NULL,
        booked_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_transfer PRIMARY KEY (id),
        CONSTRAINT ck_transfer_amount CHECK (amount > 0),
        CONSTRAINT ck_transfer_two_accounts CHECK (debit_account <> credit_account),
        CONSTRAINT ck_transfer_balance_after CHECK (balance_after >= 0),
        CONSTRAINT ck_transfer_code CHECK (code IN ('grant', 'usage', 'late', 'receivable', 'repayment', 'expiry')),
        CONSTRAINT fk_transfer_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id),
        CONSTRAINT fk_transfer_debit_account FOREIGN KEY(debit_account) REFERENCES billing.account (id),
        CONSTRAINT fk_transfer_credit_account FOREIGN KEY(credit_account) REFERENCES billing.account (id)
    ) {partitioned}
    """
USAGE = """
    CREATE TABLE billing.usage (
        hold_id UUID NOT NULL,
        part SMALLINT NOT NULL,
        op_id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        user_id UUID,
        key_id UUID,
        model TEXT NOT NULL,
        build TEXT NOT NULL,
        price_id UUID NOT NULL,
        input_tokens BIGINT NOT NULL,
        cached_input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        cost BIGINT NOT NULL,
        finish_reason TEXT NOT NULL,
        duration_ms BIGINT NOT NULL,
        request_id TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_usage PRIMARY KEY (hold_id, part),
        CONSTRAINT ck_usage_part CHECK (part IN (0, 1)),
        CONSTRAINT ck_usage_figures CHECK (
            input_tokens >= 0 AND cached_input_tokens >= 0 AND output_tokens >= 0 AND cost >= 0 AND duration_ms >= 0
        ),
        CONSTRAINT fk_usage_hold_id FOREIGN KEY(hold_id) REFERENCES billing.hold (id),
        CONSTRAINT fk_usage_price_id FOREIGN KEY(price_id) REFERENCES billing.price (id)
    ) {partitioned}
    """
TRANSFER_INDEX = "CREATE INDEX ix_transfer_booked_at ON billing.transfer USING brin (booked_at)"
USAGE_INDEX = "CREATE INDEX ix_usage_wallet_id ON billing.usage (wallet_id, hold_id DESC, part DESC)"
# A parent, the column of its ranges, and an index that its partitions get with it.
BY_MONTH = (("transfer", "id", TRANSFER, TRANSFER_INDEX), ("usage", "hold_id", USAGE, USAGE_INDEX))

OP = """
    CREATE TABLE {schema}.op (
        tenant UUID NOT NULL,
        idem_key TEXT NOT NULL,
        id UUID NOT NULL,
        kind TEXT NOT NULL,
        body_sha256 BYTEA NOT NULL,
        refusal TEXT,
        result JSONB NOT NULL,
        actor TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_op PRIMARY KEY (tenant, idem_key),
        CONSTRAINT ck_op_body_sha256 CHECK (octet_length(body_sha256) = 32),
        CONSTRAINT ck_op_idem_key CHECK (length(idem_key) BETWEEN 1 AND 300)
    ) {partitioned}
    """
OP_COPY = (
    "DROP TABLE IF EXISTS billing_partition.op",
    OP.format(schema="billing_partition", partitioned="PARTITION BY HASH (tenant)"),
    "CREATE INDEX ix_op_id ON billing_partition.op (id)",
    *(
        f"CREATE TABLE billing_partition.op_{n:02d} PARTITION OF billing_partition.op "
        f"FOR VALUES WITH (MODULUS {OP_PARTITIONS}, REMAINDER {n})"
        for n in range(OP_PARTITIONS)
    ),
    """
    CREATE OR REPLACE FUNCTION billing_partition.copy_op() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        INSERT INTO billing_partition.op SELECT NEW.* ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE TRIGGER copy_op AFTER INSERT ON billing.op
    FOR EACH ROW EXECUTE FUNCTION billing_partition.copy_op()
    """,
)
# Whoever had rights on the former table has the same on the new one: the service does not wait for `migrate`'s end.
COPY_RIGHTS = """
    DO $$
    DECLARE
        statement text;
    BEGIN
        FOR statement IN
            SELECT format('GRANT %s ON {new} TO %I', a.privilege_type, r.rolname)
            FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
            WHERE c.oid = '{old}'::regclass AND a.grantee <> c.relowner
        LOOP
            EXECUTE statement;
        END LOOP;
    END $$
    """
GUARD = """
    CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()
    """


def _is_partitioned(table: str) -> bool:
    query = f"SELECT relkind = 'p' FROM pg_class WHERE oid = 'billing.{table}'::regclass"
    return bool(op.get_bind().exec_driver_sql(query).scalar())


def _execute(*statements: str) -> None:
    for statement in statements:
        op.get_bind().exec_driver_sql(statement)


def _turn_over_by_month(table: str, key: str, parent: str, index: str) -> None:
    """The present table becomes the first partition: all until the month after the next, or after its last row."""
    first, rest = f"billing_partition.{table}_first", f"billing_partition.{table}_default"
    newest = f"(SELECT uuid_extract_timestamp({key}) FROM billing.{table} ORDER BY {key} DESC LIMIT 1)"
    until = f"""
        SELECT billing.first_uuid7((date_trunc('month', greatest(now(), {newest}) AT TIME ZONE 'UTC')
            + interval '2 months') AT TIME ZONE 'UTC')"""
    bound = op.get_bind().exec_driver_sql(until).scalar()
    with op.get_context().autocommit_block():
        _execute(
            f"ALTER TABLE billing.{table} DROP CONSTRAINT IF EXISTS ck_{table}_first",
            f"ALTER TABLE billing.{table} ADD CONSTRAINT ck_{table}_first CHECK ({key} < '{bound}') NOT VALID",
            f"ALTER TABLE billing.{table} VALIDATE CONSTRAINT ck_{table}_first",
        )
    _execute(
        *SHUT_GATE,
        f"ALTER TABLE billing.{table} SET SCHEMA billing_partition",
        f"ALTER TABLE billing_partition.{table} RENAME TO {table}_first",
        parent.format(partitioned=f"PARTITION BY RANGE ({key})"),
        index,
        COPY_RIGHTS.format(old=first, new=f"billing.{table}"),
        # The CHECK says that every row is within the range: nothing is scanned.
        f"ALTER TABLE billing.{table} ATTACH PARTITION {first} FOR VALUES FROM (MINVALUE) TO ('{bound}')",
        f"ALTER TABLE {first} DROP CONSTRAINT ck_{table}_first",
        f"CREATE TABLE {rest} PARTITION OF billing.{table} DEFAULT",
        GUARD.format(table=f"billing.{table}"),
        GUARD.format(table=rest),
    )
    if table == "transfer":
        _execute(f"ALTER TABLE {rest} ADD UNIQUE (wallet_id, wallet_seq)")


def _turn_over_op() -> None:
    """A trigger copies what comes, a plain copy what was there; the exchange waits for both."""
    with op.get_context().autocommit_block():
        _execute("SET lock_timeout = '5s'", *OP_COPY, "RESET lock_timeout")
        _execute("INSERT INTO billing_partition.op SELECT * FROM billing.op ON CONFLICT DO NOTHING")
    _execute(
        *SHUT_GATE,
        "LOCK TABLE billing.op IN ACCESS EXCLUSIVE MODE",
        COPY_RIGHTS.format(old="billing.op", new="billing_partition.op"),
        "DROP TABLE billing.op",
        "DROP FUNCTION billing_partition.copy_op()",
        "ALTER TABLE billing_partition.op SET SCHEMA billing",
        GUARD.format(table="billing.op"),
        *(GUARD.format(table=f"billing_partition.op_{n:02d}") for n in range(OP_PARTITIONS)),
    )


def upgrade() -> None:
    """Turn over what is not partitioned yet, table by table, and make the next months' partitions."""
    _execute("CREATE SCHEMA IF NOT EXISTS billing_partition", *FUNCTIONS)
    for table, key, parent, index in BY_MONTH:
        if not _is_partitioned(table):
            _turn_over_by_month(table, key, parent, index)
    if not _is_partitioned("op"):
        _turn_over_op()
    _execute("SELECT billing.make_partitions(3)")


def downgrade() -> None:
    """Copy the rows back into plain tables, all in one transaction: writers wait."""
    former = "billing_former"
    numbered = (
        "ALTER TABLE billing.transfer ADD CONSTRAINT uq_transfer_wallet_id_wallet_seq UNIQUE (wallet_id, wallet_seq)"
    )
    tables = (
        ("op", (OP.format(schema="billing", partitioned=""), "CREATE INDEX ix_op_id ON billing.op (id)")),
        ("transfer", (TRANSFER.format(partitioned=""), TRANSFER_INDEX, numbered)),
        ("usage", (USAGE.format(partitioned=""), USAGE_INDEX)),
    )
    _execute(*SHUT_GATE, f"CREATE SCHEMA {former}")
    for table, definition in tables:
        _execute(
            f"ALTER TABLE billing.{table} SET SCHEMA {former}",
            *definition,
            COPY_RIGHTS.format(old=f"{former}.{table}", new=f"billing.{table}"),
            f"INSERT INTO billing.{table} SELECT * FROM {former}.{table}",
            f"DROP TABLE {former}.{table}",
            GUARD.format(table=f"billing.{table}"),
        )
    _execute(
        f"DROP SCHEMA {former}",
        "DROP SCHEMA billing_partition",
        "DROP FUNCTION billing.make_partitions(integer)",
        "DROP FUNCTION billing.add_partition(text, text, timestamptz, timestamptz)",
        "DROP FUNCTION billing.first_uuid7(timestamptz)",
    )
