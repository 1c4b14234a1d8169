"""The ledger's tables, with the triggers that keep what is written once as it was written.

Revision ID: 0001
Revises: none
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

PRICES = (
    """
    CREATE TABLE billing.tariff (
        id BIGINT GENERATED ALWAYS AS IDENTITY,
        model TEXT NOT NULL,
        customer_class TEXT NOT NULL,
        CONSTRAINT pk_tariff PRIMARY KEY (id),
        CONSTRAINT uq_tariff_model_customer_class UNIQUE (model, customer_class)
    )
    """,
    """
    CREATE TABLE billing.price (
        id UUID NOT NULL,
        tariff_id BIGINT NOT NULL,
        per_request BIGINT NOT NULL,
        input BIGINT NOT NULL,
        cached_input BIGINT NOT NULL,
        output BIGINT NOT NULL,
        validity TSTZRANGE NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        created_by TEXT NOT NULL,
        CONSTRAINT pk_price PRIMARY KEY (id),
        CONSTRAINT ck_price_terms CHECK (
            per_request >= 0 AND cached_input >= 0 AND cached_input <= input AND output >= 0
        ),
        CONSTRAINT ck_price_validity CHECK (NOT isempty(validity) AND lower(validity) IS NOT NULL),
        CONSTRAINT ex_price_no_overlap EXCLUDE USING gist (
            int8range(tariff_id, tariff_id, '[]') WITH &&, validity WITH &&
        ),
        CONSTRAINT fk_price_tariff_id FOREIGN KEY(tariff_id) REFERENCES billing.tariff (id)
    )
    """,
)

WALLETS = (
    """
    CREATE TABLE billing.wallet (
        id UUID NOT NULL,
        seq BIGINT NOT NULL,
        frozen_at TIMESTAMPTZ,
        created_at TIMESTAMPTZ NOT NULL,
        updated_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_wallet PRIMARY KEY (id),
        CONSTRAINT ck_wallet_seq CHECK (seq >= 0)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX ix_wallet_frozen_at ON billing.wallet (frozen_at) WHERE frozen_at IS NOT NULL",
    """
    CREATE TABLE billing.account (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        kind TEXT NOT NULL,
        limited BOOLEAN NOT NULL,
        debits_posted BIGINT NOT NULL,
        credits_posted BIGINT NOT NULL,
        debits_pending BIGINT NOT NULL,
        credits_pending BIGINT NOT NULL,
        CONSTRAINT pk_account PRIMARY KEY (id),
        CONSTRAINT ck_account_kind CHECK (kind IN ('grant', 'funding', 'revenue', 'receivable', 'breakage')),
        CONSTRAINT ck_account_limited_kind CHECK (limited = (kind = 'grant')),
        CONSTRAINT ck_account_counters CHECK (
            debits_posted >= 0 AND credits_posted >= 0 AND debits_pending >= 0 AND credits_pending >= 0
        ),
        CONSTRAINT ck_account_never_negative CHECK (
            NOT limited OR debits_posted + debits_pending <= credits_posted
        ),
        CONSTRAINT fk_account_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX ix_account_wallet_id ON billing.account (wallet_id)",
    "CREATE UNIQUE INDEX uq_account_wallet_id_system ON billing.account (wallet_id, kind) WHERE kind <> 'grant'",
    """
    CREATE TABLE billing.credit_grant (
        account_id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        priority SMALLINT NOT NULL,
        effective_at TIMESTAMPTZ NOT NULL,
        expires_at TIMESTAMPTZ,
        source TEXT NOT NULL,
        reason TEXT NOT NULL,
        CONSTRAINT pk_credit_grant PRIMARY KEY (account_id),
        CONSTRAINT fk_credit_grant_account_id FOREIGN KEY(account_id) REFERENCES billing.account (id),
        CONSTRAINT fk_credit_grant_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id)
    )
    """,
    "CREATE INDEX ix_credit_grant_wallet_id ON billing.credit_grant (wallet_id)",
    """
    CREATE TABLE billing.expiring_grant (
        account_id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_expiring_grant PRIMARY KEY (account_id),
        CONSTRAINT fk_expiring_grant_account_id FOREIGN KEY(account_id) REFERENCES billing.credit_grant (account_id)
    )
    """,
    "CREATE INDEX ix_expiring_grant_expires_at ON billing.expiring_grant (expires_at)",
    """
    CREATE TABLE billing.topup (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        provider TEXT NOT NULL,
        provider_ref TEXT NOT NULL,
        amount BIGINT NOT NULL,
        status TEXT DEFAULT 'pending' NOT NULL,
        grant_account_id UUID,
        created_at TIMESTAMPTZ NOT NULL,
        updated_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_topup PRIMARY KEY (id),
        CONSTRAINT ck_topup_amount CHECK (amount > 0),
        CONSTRAINT ck_topup_status CHECK (status IN ('pending', 'paid', 'failed')),
        CONSTRAINT ck_topup_paid_is_granted CHECK ((status = 'paid') = (grant_account_id IS NOT NULL)),
        CONSTRAINT uq_topup_provider_provider_ref UNIQUE (provider, provider_ref),
        CONSTRAINT fk_topup_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id),
        CONSTRAINT fk_topup_grant_account_id FOREIGN KEY(grant_account_id) REFERENCES billing.credit_grant (account_id)
    )
    """,
    "CREATE INDEX ix_topup_wallet_id ON billing.topup (wallet_id)",
)

HOLDS = (
    """
    CREATE TABLE billing.hold (
        id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        user_id UUID,
        key_id UUID,
        plan TEXT NOT NULL,
        model TEXT NOT NULL,
        price_id UUID NOT NULL,
        input_tokens BIGINT NOT NULL,
        cached_input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        amount BIGINT NOT NULL,
        request_id TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_hold PRIMARY KEY (id),
        CONSTRAINT ck_hold_amount CHECK (amount >= 0),
        CONSTRAINT fk_hold_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id),
        CONSTRAINT fk_hold_price_id FOREIGN KEY(price_id) REFERENCES billing.price (id)
    )
    """,
    """
    CREATE TABLE billing.hold_slice (
        hold_id UUID NOT NULL,
        position INTEGER NOT NULL,
        account_id UUID NOT NULL,
        amount BIGINT NOT NULL,
        CONSTRAINT pk_hold_slice PRIMARY KEY (hold_id, position),
        CONSTRAINT ck_hold_slice_amount CHECK (amount > 0),
        CONSTRAINT uq_hold_slice_hold_id_account_id UNIQUE (hold_id, account_id),
        CONSTRAINT fk_hold_slice_hold_id FOREIGN KEY(hold_id) REFERENCES billing.hold (id),
        CONSTRAINT fk_hold_slice_account_id FOREIGN KEY(account_id) REFERENCES billing.account (id)
    )
    """,
    """
    CREATE TABLE billing.open_hold (
        hold_id UUID NOT NULL,
        wallet_id UUID NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL,
        input_tokens BIGINT NOT NULL,
        cached_input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        CONSTRAINT pk_open_hold PRIMARY KEY (hold_id),
        CONSTRAINT fk_open_hold_hold_id FOREIGN KEY(hold_id) REFERENCES billing.hold (id)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX ix_open_hold_expires_at ON billing.open_hold (expires_at)",
    """
    CREATE TABLE billing.hold_resolution (
        hold_id UUID NOT NULL,
        op_id UUID NOT NULL,
        kind TEXT NOT NULL,
        amount BIGINT NOT NULL,
        resolved_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT pk_hold_resolution PRIMARY KEY (hold_id),
        CONSTRAINT ck_hold_resolution_kind CHECK (kind IN ('post', 'void', 'expire')),
        CONSTRAINT ck_hold_resolution_amount CHECK (amount >= 0 AND (kind <> 'void' OR amount = 0)),
        CONSTRAINT fk_hold_resolution_hold_id FOREIGN KEY(hold_id) REFERENCES billing.hold (id)
    )
    """,
)

JOURNAL = (
    """
    CREATE TABLE billing.op (
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
    )
    """,
    "CREATE INDEX ix_op_id ON billing.op (id)",
    """
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
        CONSTRAINT uq_transfer_wallet_id_wallet_seq UNIQUE (wallet_id, wallet_seq),
        CONSTRAINT fk_transfer_wallet_id FOREIGN KEY(wallet_id) REFERENCES billing.wallet (id),
        CONSTRAINT fk_transfer_debit_account FOREIGN KEY(debit_account) REFERENCES billing.account (id),
        CONSTRAINT fk_transfer_credit_account FOREIGN KEY(credit_account) REFERENCES billing.account (id)
    )
    """,
    "CREATE INDEX ix_transfer_booked_at ON billing.transfer USING brin (booked_at)",
    """
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
    )
    """,
    "CREATE INDEX ix_usage_wallet_id ON billing.usage (wallet_id, hold_id DESC, part DESC)",
)
APPEND_ONLY = ("credit_grant", "op", "transfer", "tariff", "hold", "hold_slice", "hold_resolution", "usage")
GUARDED = ("wallet", "account", "price")

GUARDS = (
    """
    CREATE FUNCTION billing.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'billing.% is append-only: % refused', TG_TABLE_NAME, TG_OP
            USING ERRCODE = 'restrict_violation';
    END $$
    """,
    """
    CREATE FUNCTION billing.keep_counters_monotonic() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.debits_posted < OLD.debits_posted OR NEW.credits_posted < OLD.credits_posted
            OR (NEW.id, NEW.wallet_id, NEW.kind) IS DISTINCT FROM (OLD.id, OLD.wallet_id, OLD.kind)
        THEN
            RAISE EXCEPTION 'posted counters only grow' USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE FUNCTION billing.only_close_price() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (NEW.id, NEW.tariff_id, NEW.per_request, NEW.input, NEW.cached_input, NEW.output, NEW.created_at)
                IS DISTINCT FROM
            (OLD.id, OLD.tariff_id, OLD.per_request, OLD.input, OLD.cached_input, OLD.output, OLD.created_at)
            OR lower(NEW.validity) <> lower(OLD.validity)
            OR upper(OLD.validity) IS NOT NULL OR upper(NEW.validity) IS NULL OR upper(NEW.validity) < now()
        THEN
            RAISE EXCEPTION 'a price is only ever closed, once, not in the past' USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER keep_counters_monotonic BEFORE UPDATE ON billing.account
    FOR EACH ROW EXECUTE FUNCTION billing.keep_counters_monotonic()
    """,
    """
    CREATE TRIGGER only_close_price BEFORE UPDATE ON billing.price
    FOR EACH ROW EXECUTE FUNCTION billing.only_close_price()
    """,
)


def upgrade() -> None:
    """Make the tables and their guards. The triggers bind the owner too; the service's role has no right at all."""
    for statement in (*PRICES, *WALLETS, *HOLDS, *JOURNAL, *GUARDS):
        op.get_bind().exec_driver_sql(statement)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.{table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()"
        )
    for table in GUARDED:
        op.execute(
            f"CREATE TRIGGER refuse_removal BEFORE DELETE OR TRUNCATE ON billing.{table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()"
        )


def downgrade() -> None:
    """Drop everything. There is no way back for the data."""
    for table in (
        *("usage", "transfer", "op", "hold_resolution", "open_hold", "hold_slice", "hold"),
        *("topup", "expiring_grant", "credit_grant", "account", "wallet", "price", "tariff"),
    ):
        op.execute(f"DROP TABLE billing.{table}")
    for function in ("refuse_change", "keep_counters_monotonic", "only_close_price"):
        op.execute(f"DROP FUNCTION billing.{function}()")
