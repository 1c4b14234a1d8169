"""The ledger: wallets, accounts, grants, operations, transfers, holds, usage, prices.

Ids of transfers and holds are UUIDv7: ranges of the primary key are ranges of time, and so these tables are partitioned
by month (docs/decisions/0012). Partitions are in schema `billing_partition`, each of `transfer` with a
UNIQUE (wallet_id, wallet_seq) of its own.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TSTZRANGE, ExcludeConstraint

from services.billing.tables.schema import HOT_FILLFACTOR, at, tables


def _counter(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


wallet = Table(
    "wallet",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    at("frozen_at", nullable=True),
    at("created_at"),
    at("updated_at"),
    # Grows with every change, by whoever, of what a writer has in memory of it: its budgets, whether it is frozen.
    Column("version", BigInteger, nullable=False, server_default=text("0")),
    CheckConstraint("seq >= 0", name="seq"),
    Index(None, "frozen_at", postgresql_where=text("frozen_at IS NOT NULL")),
    postgresql_with={"fillfactor": HOT_FILLFACTOR},
)

account = Table(
    "account",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("limited", Boolean, nullable=False),
    _counter("debits_posted"),
    _counter("credits_posted"),
    _counter("debits_pending"),
    _counter("credits_pending"),
    CheckConstraint("kind IN ('grant', 'funding', 'revenue', 'receivable', 'breakage')", name="kind"),
    CheckConstraint("limited = (kind = 'grant')", name="limited_kind"),
    CheckConstraint(
        "debits_posted >= 0 AND credits_posted >= 0 AND debits_pending >= 0 AND credits_pending >= 0", name="counters"
    ),
    CheckConstraint("NOT limited OR debits_posted + debits_pending <= credits_posted", name="never_negative"),
    Index(None, "wallet_id"),
    Index("uq_account_wallet_id_system", "wallet_id", "kind", unique=True, postgresql_where=text("kind <> 'grant'")),
    postgresql_with={"fillfactor": HOT_FILLFACTOR},
)

credit_grant = Table(
    "credit_grant",
    tables,
    Column("account_id", Uuid, ForeignKey("billing.account.id"), primary_key=True),
    Column("wallet_id", Uuid, ForeignKey("billing.wallet.id"), nullable=False),
    Column("priority", SmallInteger, nullable=False),
    at("effective_at"),
    at("expires_at", nullable=True),
    Column("source", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "wallet_id"),
)

expiring_grant = Table(
    "expiring_grant",
    tables,
    Column("account_id", Uuid, ForeignKey("billing.credit_grant.account_id"), primary_key=True),
    Column("wallet_id", Uuid, nullable=False),
    at("expires_at"),
    Index(None, "expires_at"),
)

op = Table(
    "op",
    tables,
    Column("tenant", Uuid, primary_key=True),
    Column("idem_key", Text, primary_key=True),
    Column("id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body_sha256", LargeBinary, nullable=False),
    Column("refusal", Text),
    Column("result", JSONB, nullable=False),
    Column("actor", Text, nullable=False),
    at("created_at"),
    CheckConstraint("octet_length(body_sha256) = 32", name="body_sha256"),
    CheckConstraint("length(idem_key) BETWEEN 1 AND 300", name="idem_key"),
    Index(None, "id"),
    postgresql_partition_by="HASH (tenant)",
)

transfer = Table(
    "transfer",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("op_id", Uuid, nullable=False),
    Column("wallet_id", Uuid, nullable=False),
    Column("wallet_seq", BigInteger, nullable=False),
    Column("debit_account", Uuid, nullable=False),
    Column("credit_account", Uuid, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("code", Text, nullable=False),
    Column("hold_id", Uuid),
    Column("balance_after", BigInteger, nullable=False),
    at("effective_at"),
    at("booked_at"),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint("debit_account <> credit_account", name="two_accounts"),
    CheckConstraint("balance_after >= 0", name="balance_after"),
    CheckConstraint(
        "code IN ('grant', 'usage', 'late', 'receivable', 'repayment', 'expiry', 'charge', 'refund', 'reversal')",
        name="code",
    ),
    Index(None, "booked_at", postgresql_using="brin"),
    Index(None, "hold_id", postgresql_where=text("hold_id IS NOT NULL")),
    postgresql_partition_by="RANGE (id)",
)

tariff = Table(
    "tariff",
    tables,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("model", Text, nullable=False),
    Column("customer_class", Text, nullable=False),
    UniqueConstraint("model", "customer_class"),
)

price = Table(
    "price",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("tariff_id", BigInteger, ForeignKey("billing.tariff.id"), nullable=False),
    Column("per_request", BigInteger, nullable=False),
    Column("input", BigInteger, nullable=False),
    Column("cached_input", BigInteger, nullable=False),
    Column("output", BigInteger, nullable=False),
    Column("validity", TSTZRANGE, nullable=False),
    at("created_at"),
    Column("created_by", Text, nullable=False),
    CheckConstraint("per_request >= 0 AND cached_input >= 0 AND cached_input <= input AND output >= 0", name="terms"),
    CheckConstraint("NOT isempty(validity) AND lower(validity) IS NOT NULL", name="validity"),
    # A range of one number stands for equality, which GiST knows for ranges without an extension.
    ExcludeConstraint(
        (func.int8range(text("tariff_id"), text("tariff_id"), text("'[]'")), "&&"),
        (Column("validity"), "&&"),
        using="gist",
        name="ex_price_no_overlap",
    ),
)

hold = Table(
    "hold",
    tables,
    Column("id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, nullable=False),
    Column("user_id", Uuid),
    Column("key_id", Uuid),
    Column("plan", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("price_id", Uuid, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("request_id", Text, nullable=False),
    at("created_at"),
    CheckConstraint("amount >= 0", name="amount"),
)

hold_slice = Table(
    "hold_slice",
    tables,
    Column("hold_id", Uuid, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("account_id", Uuid, nullable=False),
    Column("amount", BigInteger, nullable=False),
    CheckConstraint("amount > 0", name="amount"),
)

# More for a hold that is open, and the slices of it with it: `amount` is added, `output_tokens` are covered in all.
hold_extension = Table(
    "hold_extension",
    tables,
    Column("hold_id", Uuid, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("op_id", Uuid, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    at("created_at"),
    CheckConstraint("number > 0", name="number"),
    CheckConstraint("amount >= 0", name="amount"),
)

open_hold = Table(
    "open_hold",
    tables,
    Column("hold_id", Uuid, primary_key=True),
    Column("wallet_id", Uuid, nullable=False),
    at("expires_at"),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Index(None, "expires_at"),
    postgresql_with={"fillfactor": HOT_FILLFACTOR},
)

hold_resolution = Table(
    "hold_resolution",
    tables,
    Column("hold_id", Uuid, primary_key=True),
    Column("op_id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    at("resolved_at"),
    CheckConstraint("kind IN ('post', 'void', 'expire')", name="kind"),
    CheckConstraint("amount >= 0 AND (kind <> 'void' OR amount = 0)", name="amount"),
)

usage = Table(
    "usage",
    tables,
    Column("hold_id", Uuid, primary_key=True),
    Column("part", SmallInteger, primary_key=True),
    Column("op_id", Uuid, nullable=False),
    Column("wallet_id", Uuid, nullable=False),
    Column("user_id", Uuid),
    Column("key_id", Uuid),
    Column("model", Text, nullable=False),
    Column("build", Text, nullable=False),
    Column("price_id", Uuid, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
    Column("finish_reason", Text, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("request_id", Text, nullable=False),
    at("created_at"),
    CheckConstraint("part IN (0, 1)", name="part"),
    CheckConstraint(
        "input_tokens >= 0 AND cached_input_tokens >= 0 AND output_tokens >= 0 AND cost >= 0 AND duration_ms >= 0",
        name="figures",
    ),
    Index(None, "wallet_id", text("hold_id DESC"), text("part DESC")),
    postgresql_partition_by="RANGE (hold_id)",
)

# The sums of usage, kept in the transaction that writes it. Without a key: a person's own requests.
usage_day = Table(
    "usage_day",
    tables,
    Column("wallet_id", Uuid, nullable=False),
    Column("day", Date, nullable=False),
    Column("model", Text, nullable=False),
    Column("key_id", Uuid),
    Column("user_id", Uuid),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
    UniqueConstraint(
        *("wallet_id", "day", "model", "key_id", "user_id"),
        name="uq_usage_day_wallet_id_day_model_key_id_user_id",
        postgresql_nulls_not_distinct=True,
    ),
    CheckConstraint(
        "requests >= 0 AND input_tokens >= 0 AND cached_input_tokens >= 0 AND output_tokens >= 0 AND cost >= 0",
        name="figures",
    ),
    postgresql_with={"fillfactor": HOT_FILLFACTOR},
)

# What was done to a wallet by hand, or for a payment that went back, by whom and why.
audit = Table(
    "audit",
    tables,
    Column("wallet_id", Uuid, primary_key=True),
    Column("op_id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("amount", BigInteger),
    Column("frozen", Boolean),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    at("created_at"),
    CheckConstraint("kind IN ('charge', 'refund', 'take_back', 'freeze')", name="kind"),
    CheckConstraint("(kind = 'freeze') = (frozen IS NOT NULL AND amount IS NULL)", name="subject"),
)

# The sums of charges, as `usage_day` has those of requests: both count for budgets.
charge_day = Table(
    "charge_day",
    tables,
    Column("wallet_id", Uuid, nullable=False),
    Column("day", Date, nullable=False),
    Column("key_id", Uuid),
    Column("user_id", Uuid),
    Column("amount", BigInteger, nullable=False),
    UniqueConstraint(
        *("wallet_id", "day", "key_id", "user_id"),
        name="uq_charge_day_wallet_id_day_key_id_user_id",
        postgresql_nulls_not_distinct=True,
    ),
    CheckConstraint("amount > 0", name="amount"),
)

# Who leads which wallets. An epoch is raised by each new leader, and looked at by each transaction.
shard = Table(
    "shard",
    tables,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("leader", Text, nullable=False),
    at("updated_at"),
    CheckConstraint("id BETWEEN 0 AND 255", name="id"),
)

# One row; a trigger raises it with every change of a price, so that writers know when to look again.
price_generation = Table(
    "price_generation",
    tables,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="id"),
)

# What is written once. `migrate` gives no right to change these; triggers refuse even their owner.
APPEND_ONLY = (
    *("credit_grant", "op", "transfer", "tariff", "audit"),
    *("hold", "hold_slice", "hold_extension", "hold_resolution", "usage"),
)

SERVICE_GRANTS = {
    **dict.fromkeys(APPEND_ONLY, "SELECT, INSERT"),
    "wallet": "SELECT, INSERT, UPDATE (seq, frozen_at, updated_at, version)",
    "account": "SELECT, INSERT, UPDATE (debits_posted, credits_posted, debits_pending, credits_pending)",
    "open_hold": "SELECT, INSERT, DELETE, UPDATE (expires_at, input_tokens, cached_input_tokens, output_tokens)",
    "expiring_grant": "SELECT, INSERT, DELETE",
    "usage_day": "SELECT, INSERT, UPDATE (requests, input_tokens, cached_input_tokens, output_tokens, cost)",
    "charge_day": "SELECT, INSERT, UPDATE (amount)",
    "shard": "SELECT, INSERT, UPDATE, DELETE",
    "price_generation": "SELECT",
    "price": "SELECT, INSERT, UPDATE (validity)",
}
