"""What chat reads from the environment, and every limit it keeps."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.chat.domain.request import Limits
from shared.flags import FlagSettings
from shared.metering import MeteringLimits
from shared.runtime import ServiceSettings


class MigrationSettings(BaseSettings):
    """What `migrate` reads: the owner's URL and the one of the role that it makes."""

    model_config = SettingsConfigDict(env_prefix="TOLLGATE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr
    chat_database_url: SecretStr


class ChatSettings(ServiceSettings):
    """Names carry the prefix TOLLGATE_ in the environment; units stand at the end of a name."""

    chat_http_listen: str
    chat_database_url: SecretStr
    redis_url: SecretStr
    billing_grpc: str
    inference_grpc: str
    unleash_url: str
    unleash_token: SecretStr
    flags_backup: Path | None = None

    catalogue_refresh_ms: int = Field(default=1_000, ge=50)
    catalogue_refresh_loading_ms: int = Field(default=200, ge=50)

    chat_max_tokens_default: int = Field(default=512, ge=1)
    chat_messages_max: int = Field(default=1_000, ge=1)
    chat_prompt_chars_max: int = Field(default=500_000, ge=1)
    chat_choices_max: int = Field(default=8, ge=1)
    chat_generations_max: int = Field(default=1_000, ge=1)
    chat_count_timeout_ms: int = Field(default=10_000, ge=1)
    chat_first_chunk_timeout_ms: int = Field(default=60_000, ge=1)
    chat_chunk_timeout_ms: int = Field(default=15_000, ge=1)
    chat_generation_timeout_ms: int = Field(default=300_000, ge=1)
    chat_load_wait_ms: int = Field(default=30_000, ge=0)
    chat_send_timeout_ms: int = Field(default=30_000, ge=1)
    chat_priority_plans: frozenset[str] = frozenset()
    chat_breaker_failures_max: int = Field(default=3, ge=1)
    chat_breaker_pause_ms: int = Field(default=5_000, ge=1)
    chat_processes: int = Field(default=1, ge=1)  # that share the token limits while Redis is away
    chat_redis_timeout_ms: int = Field(default=100, ge=1)
    chat_database_connections_max: int = Field(default=10, ge=1)
    chat_retention_days: int = Field(default=30, ge=1, le=3_650)
    chat_cache_ttl_s: int = Field(default=3_600, ge=1)
    chat_cache_bytes_max: int = Field(default=64 * 1024, ge=1)
    chat_left_running_max: int = Field(default=16, ge=1)  # requests of a key whose clients have left
    chat_replay_kept_h: int = Field(default=24, ge=1)
    chat_purge_interval_s: int = Field(default=60, ge=1)
    chat_hold_ttl_ms: int = Field(default=30_000, ge=1_000)
    chat_settle_wait_ms: int = Field(default=5_000, ge=1)

    def limits(self) -> Limits:
        return Limits(
            max_tokens_default=self.chat_max_tokens_default,
            messages_max=self.chat_messages_max,
            prompt_chars_max=self.chat_prompt_chars_max,
            choices_max=self.chat_choices_max,
            generations_max=self.chat_generations_max,
            count_timeout_s=self.chat_count_timeout_ms / 1000,
            first_chunk_timeout_s=self.chat_first_chunk_timeout_ms / 1000,
            chunk_timeout_s=self.chat_chunk_timeout_ms / 1000,
            generation_timeout_s=self.chat_generation_timeout_ms / 1000,
            send_timeout_s=self.chat_send_timeout_ms / 1000,
            load_wait_s=self.chat_load_wait_ms / 1000,
            priority_plans=self.chat_priority_plans,
        )

    def metering_limits(self) -> MeteringLimits:
        return MeteringLimits(hold_ttl_ms=self.chat_hold_ttl_ms, settle_wait_s=self.chat_settle_wait_ms / 1000)

    def flag_settings(self) -> FlagSettings:
        return FlagSettings(
            url=self.unleash_url,
            token=self.unleash_token.get_secret_value(),
            app_name="tollgate-chat",
            backup=self.flags_backup,
        )
