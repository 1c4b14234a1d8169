"""What auth reads from the environment. Only app.py, cli.py and __main__.py read it."""

from __future__ import annotations

import base64
import binascii
import os
import sys
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.auth.domain import RegistrationMode
from services.auth.domain.oidc import OidcProvider
from shared.runtime import ServiceSettings

SECRET_KEY_BYTES = 32


class AuthSettings(ServiceSettings):
    """The service's settings; secrets do not print."""

    auth_http_listen: str = "127.0.0.1:8101"
    auth_database_url: SecretStr
    redis_url: SecretStr
    api_key_peppers: SecretStr
    auth_secret_key: SecretStr

    auth_access_token_ttl_s: int = Field(default=900, ge=1)
    auth_refresh_token_ttl_s: int = Field(default=30 * 86_400, ge=1)
    auth_session_ttl_s: int = Field(default=90 * 86_400, ge=1)
    # A signing key is published long enough before it signs that all know it; 0 days: never replaced.
    auth_signing_key_rotation_days: int = Field(default=90, ge=0)
    auth_signing_key_lead_s: int = Field(default=60, ge=0)
    auth_signing_key_refresh_interval_s: int = Field(default=10, ge=1)
    auth_sessions_per_user_max: int = Field(default=50, ge=1)
    auth_keys_per_org_max: int = Field(default=1_000, ge=1)

    auth_self_service_orgs: bool = False
    auth_orgs_per_user_max: int = Field(default=20, ge=1)
    auth_members_per_org_max: int = Field(default=500, ge=1)
    auth_service_accounts_per_org_max: int = Field(default=100, ge=1)
    auth_invitations_per_org_max: int = Field(default=100, ge=1)
    auth_invitation_ttl_s: int = Field(default=7 * 86_400, ge=60)

    # E-mail: nothing is sent without a server. With registration `verified` there must be one.
    auth_registration: RegistrationMode = RegistrationMode.OPEN
    auth_smtp_url: SecretStr | None = None
    auth_smtp_timeout_s: int = Field(default=15, ge=1)
    auth_email_from: str = "tollgate@localhost"
    auth_email_link_url: str = ""
    auth_email_verification_ttl_s: int = Field(default=86_400, ge=60)
    auth_password_reset_ttl_s: int = Field(default=1_800, ge=60)
    auth_email_waiting_max: int = Field(default=10_000, ge=1)
    auth_email_per_address_hourly_max: int = Field(default=5, ge=1)
    auth_email_attempts_max: int = Field(default=8, ge=1)
    auth_email_retry_base_s: int = Field(default=15, ge=1)
    auth_email_interval_ms: int = Field(default=1_000, ge=1)

    # OpenID providers, as JSON: [{"name": "corp", "issuer": "https://…", "client_id": "…", "client_secret": "…"}].
    public_url: str = "http://127.0.0.1:8080"
    auth_oidc_providers: tuple[OidcProvider, ...] = ()
    auth_oidc_timeout_s: int = Field(default=5, ge=1)

    # Failed sign-ins: how many are free, then waits that double; all forgotten after a while. See docs/auth.md.
    auth_sign_in_pair_free: int = Field(default=5, ge=1)
    auth_sign_in_name_free: int = Field(default=20, ge=1)
    auth_sign_in_address_free: int = Field(default=100, ge=1)
    auth_sign_in_backoff_base_ms: int = Field(default=1_000, ge=1)
    auth_sign_in_backoff_max_s: int = Field(default=900, ge=1)
    auth_sign_in_memory_s: int = Field(default=3_600, ge=1)

    # argon2id as OWASP's password storage cheat sheet sets it: 19 MiB, two passes, one lane.
    auth_argon2_time_cost: int = Field(default=2, ge=1)
    auth_argon2_memory_kib: int = Field(default=19_456, ge=8)
    auth_argon2_parallelism: int = Field(default=1, ge=1)
    # One core less than there are, so that sign-ins leave one to everybody else.
    auth_argon2_threads: int = Field(default_factory=lambda: max(1, _cores() - 1), ge=1)
    auth_argon2_queue_max: int = Field(default=64, ge=0)
    auth_argon2_nice: int = Field(default=10, ge=0, le=19)
    auth_sign_in_database_pool_size: int = Field(default=3, ge=1)
    auth_sign_in_database_wait_s: int = Field(default=20, ge=1)

    auth_database_pool_size: int = Field(default=10, ge=1)
    auth_redis_timeout_ms: int = Field(default=100, ge=1)
    auth_outbox_interval_ms: int = Field(default=500, ge=1)
    auth_outbox_batch_max: int = Field(default=500, ge=1)
    auth_outbox_repeat_s: int = Field(default=30, ge=0)  # after a failover of Redis
    auth_outbox_prune_interval_s: int = Field(default=300, ge=1)
    auth_key_usage_interval_ms: int = Field(default=5_000, ge=1)
    auth_key_usage_batch_max: int = Field(default=1_000, ge=1)
    auth_key_usage_days: int = Field(default=400, ge=1)
    auth_prune_interval_s: int = Field(default=3_600, ge=1)
    auth_prune_batch_max: int = Field(default=10_000, ge=1)

    @field_validator("auth_secret_key")
    @classmethod
    def _is_aes_256(cls, value: SecretStr) -> SecretStr:
        _decode_secret_key(value)
        return value

    @model_validator(mode="after")
    def _verifies_by_email(self) -> Self:
        if self.auth_registration is RegistrationMode.VERIFIED and self.auth_smtp_url is None:
            raise ValueError("TOLLGATE_AUTH_REGISTRATION=verified wants TOLLGATE_AUTH_SMTP_URL")
        return self

    @property
    def secret_key(self) -> bytes:
        """The AES-256 key that encrypts the JWT signing keys at rest."""
        return _decode_secret_key(self.auth_secret_key)


class BootstrapSettings(AuthSettings):
    """As the service, and the password of the user to make."""

    bootstrap_password: SecretStr


class MigrationSettings(BaseSettings):
    """The owner's URL, and those of the roles that `migrate` makes."""

    model_config = SettingsConfigDict(env_prefix="TOLLGATE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr
    auth_database_url: SecretStr
    gateway_database_url: SecretStr


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _decode_secret_key(value: SecretStr) -> bytes:
    try:
        secret = base64.b64decode(value.get_secret_value(), validate=True)
    except (binascii.Error, ValueError) as e:
        raise ValueError("is not base64") from e
    if len(secret) != SECRET_KEY_BYTES:
        raise ValueError(f"wants {SECRET_KEY_BYTES} bytes in base64")
    return secret
