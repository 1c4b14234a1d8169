"""Settings of the inference service, from the environment (prefix TOLLGATE_)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from services.inference.texts import Limits
from shared.flags import FlagSettings
from shared.runtime import ServiceSettings


class Settings(ServiceSettings):
    """Where Triton and its model repository are, and how closely the builds are watched."""

    inference_http_listen: str
    inference_grpc_listen: str
    triton_grpc: str
    model_repository: Path
    billing_grpc: str
    unleash_url: str
    unleash_token: SecretStr
    flags_backup: Path | None = None

    inference_poll_interval_ms: int = Field(default=1_000, ge=50)
    inference_control_timeout_ms: int = Field(default=2_000, ge=100)
    inference_canary_timeout_ms: int = Field(default=2_000, ge=100)
    inference_canary_failures_max: int = Field(default=2, ge=1)
    inference_load_timeout_ms: int = Field(default=600_000, ge=1_000)
    inference_first_token_timeout_ms: int = Field(default=60_000, ge=1_000)
    inference_backoff_min_ms: int = Field(default=500, ge=10)
    inference_backoff_max_ms: int = Field(default=30_000, ge=10)
    inference_probe_interval_ms: int = Field(default=30_000, ge=100)
    inference_probe_timeout_ms: int = Field(default=15_000, ge=100)
    inference_idle_unload_ms: int = Field(default=600_000, ge=100)
    inference_memory_share_max: float = Field(default=0.85, gt=0, le=1)
    inference_loaded_builds_max: int = Field(default=16, ge=1)
    inference_ensure_wait_max_ms: int = Field(default=60_000, ge=0)
    inference_texts_max: int = Field(default=256, ge=1)
    inference_texts_characters_max: int = Field(default=500_000, ge=1)
    inference_texts_running_max: int = Field(default=64, ge=1)
    inference_texts_timeout_ms: int = Field(default=60_000, ge=100)
    inference_texts_load_wait_ms: int = Field(default=30_000, ge=0)
    inference_desired_file: Path | None = None
    """Where operators' words on builds are kept; beside the catalogue when not set."""

    def flag_settings(self) -> FlagSettings:
        return FlagSettings(
            url=self.unleash_url,
            token=self.unleash_token.get_secret_value(),
            app_name="tollgate-inference",
            backup=self.flags_backup,
        )

    def text_limits(self) -> Limits:
        return Limits(
            texts_max=self.inference_texts_max,
            characters_max=self.inference_texts_characters_max,
            running_max=self.inference_texts_running_max,
            timeout_s=self.inference_texts_timeout_ms / 1000,
            load_wait_s=self.inference_texts_load_wait_ms / 1000,
        )
