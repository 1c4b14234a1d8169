"""What billing reads from the environment. Only app.py, cli.py and __main__.py read it."""

from __future__ import annotations

import socket

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.billing.domain import parse_credits
from services.billing.storefront_settings import StorefrontSettings
from shared.errors import TollgateError


class BillingSettings(StorefrontSettings):
    """The service's settings; secrets do not print."""

    billing_http_listen: str = "127.0.0.1:8102"
    billing_grpc_listen: str = "127.0.0.1:9102"
    billing_database_url: SecretStr
    signup_credits: str = "100"

    billing_database_connections_max: int = Field(default=16, ge=2)
    billing_database_acquire_timeout_s: float = Field(default=5, gt=0)
    billing_operation_timeout_s: float = Field(default=15, gt=0)
    # The same for all processes on a database, and at least as many as they are; each more makes batches smaller.
    billing_shards: int = Field(default=2, ge=1, le=256)
    billing_grpc_advertise: str = ""  # where the other processes reach this one's gRPC, when not where it listens
    billing_operations_in_flight_max: int = Field(default=10_000, ge=1)  # of each shard
    billing_wallets_in_memory_max: int = Field(default=100_000, ge=1)  # of all shards; about 3 kB each
    billing_sweep_interval_s: float = Field(default=1, gt=0)
    billing_sweep_batch_max: int = Field(default=200, ge=1)
    billing_hold_grace_s: float = Field(default=30, ge=0)  # the life that callers give a hold between heartbeats
    billing_gauges_interval_s: float = Field(default=15, gt=0)
    billing_reconcile_interval_s: float = Field(default=5, gt=0)
    billing_reconcile_transfers_max: int = Field(default=5_000, ge=1)
    billing_reconcile_holds_max: int = Field(default=2_000, ge=1)
    billing_partition_months_ahead: int = Field(default=3, ge=1, le=24)
    billing_partition_interval_s: float = Field(default=3_600, gt=0)

    @field_validator("signup_credits")
    @classmethod
    def _is_an_amount(cls, value: str) -> str:
        try:
            parse_credits(value)
        except TollgateError as e:
            raise ValueError(e.message) from None
        return value

    @property
    def grpc_address(self) -> str:
        """Where the other processes reach this one: by its host's name when it listens everywhere."""
        host, _, port = self.billing_grpc_listen.rpartition(":")
        everywhere = host in ("0.0.0.0", "[::]", "")  # noqa: S104 - compared, not bound
        return self.billing_grpc_advertise or f"{socket.gethostname() if everywhere else host}:{port}"

    @property
    def signup_nano(self) -> int:
        """The sign-up grant in nano-credits; 0 for none."""
        return parse_credits(self.signup_credits)


class DatabaseSettings(BaseSettings):
    """For commands that work as the service's own role."""

    model_config = SettingsConfigDict(env_prefix="TOLLGATE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    billing_database_url: SecretStr
    log_level: str = "INFO"


class MigrationSettings(DatabaseSettings):
    """And the owner's URL, for `migrate`."""

    database_url: SecretStr
