"""What the gateway reads from the environment. Only app.py and __main__.py read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator

from services.gateway.upstreams import ROUTES
from shared.limits import Limits
from shared.runtime import ServiceSettings

Weight = Annotated[int, Field(ge=1, le=1_000)]


class GatewaySettings(ServiceSettings):
    """The service's settings; secrets do not print. Sizes in bytes, times as their names say."""

    gateway_listen: str = "127.0.0.1:8080"
    gateway_internal_listen: str = "127.0.0.1:8081"
    public_url: str = "http://127.0.0.1:8080"
    gateway_database_url: SecretStr
    redis_url: SecretStr
    api_key_peppers: SecretStr
    auth_url: str
    billing_url: str
    chat_url: str
    inference_url: str

    trusted_proxies: str = ""  # networks, separated by commas, whose X-Forwarded-For is believed
    gateway_body_bytes_max: int = Field(default=1024 * 1024, ge=1)

    gateway_gzip_bytes_min: int = Field(default=4 * 1024, ge=1)  # responses of a known length from here on
    gateway_cors_origins: str = ""  # origins, separated by commas, or *; none: no page of another origin reads answers
    gateway_access_log_sample: float = Field(default=1.0, ge=0, le=1)  # of the responses below 400

    gateway_services_file: Path | None = None  # {"chat": ["http://…"]}; wins over TOLLGATE_<SERVICE>_URL
    gateway_services_interval_s: float = Field(default=1.0, gt=0)  # between looks at it, at DNS, and at each replica
    gateway_replica_connections_max: int = Field(default=1_024, ge=1)
    gateway_connect_timeout_ms: int = Field(default=1_000, ge=1)
    gateway_first_byte_timeout_s: float = Field(default=300, gt=0)
    gateway_idle_timeout_s: float = Field(default=60, gt=0)
    gateway_total_timeout_s: float = Field(default=3_600, gt=0)
    gateway_drain_idle_s: float = Field(default=1, gt=0)  # how long idle connections of clients outlive SIGTERM

    gateway_redis_timeout_ms: int = Field(default=100, ge=1)
    gateway_redis_pending_max: int = Field(default=10_000, ge=1)
    gateway_database_timeout_ms: int = Field(default=1_000, ge=1)
    gateway_database_connections_max: int = Field(default=8, ge=1)

    gateway_key_cache_entries_max: int = Field(default=50_000, ge=1)
    gateway_key_cache_ttl_s: float = Field(default=30, gt=0)
    gateway_negative_cache_entries_max: int = Field(default=10_000, ge=1)
    gateway_negative_cache_ttl_s: float = Field(default=30, gt=0)
    gateway_unknown_keys_per_minute: int = Field(default=60, ge=1)  # of one address, and bad tokens with them

    gateway_user_per_minute: int = Field(default=60, ge=0)
    gateway_user_per_hour: int = Field(default=1_000, ge=0)
    gateway_user_per_day: int = Field(default=10_000, ge=0)
    gateway_user_concurrency: int = Field(default=20, ge=0)
    gateway_anonymous_per_minute: int = Field(default=60, ge=0)
    gateway_anonymous_per_hour: int = Field(default=1_000, ge=0)
    # Ceilings of an installation, where a plan has none of its own: over all keys and sessions of a user in an
    # organisation, and over all of an organisation. None: no such window; 0 at once: any number.
    gateway_user_ceiling_per_minute: int | None = Field(default=None, ge=0)
    gateway_user_ceiling_per_hour: int | None = Field(default=None, ge=0)
    gateway_user_ceiling_per_day: int | None = Field(default=None, ge=0)
    gateway_user_ceiling_concurrency: int = Field(default=0, ge=0)
    gateway_organization_ceiling_per_minute: int | None = Field(default=None, ge=0)
    gateway_organization_ceiling_per_hour: int | None = Field(default=None, ge=0)
    gateway_organization_ceiling_per_day: int | None = Field(default=None, ge=0)
    gateway_organization_ceiling_concurrency: int = Field(default=0, ge=0)
    # JSON: {"/v1/embeddings": 2}: what requests of a route (as upstreams.py names it) draw from limits, instead of 1
    gateway_weights: dict[str, Weight] = Field(default_factory=dict)
    gateway_lease_ttl_s: float = Field(default=60, gt=0)

    gateway_replicas: int = Field(default=1, ge=1)  # how many share the limits, until Redis has said how many live
    gateway_heartbeat_interval_s: float = Field(default=2, gt=0)
    gateway_heartbeat_ttl_s: float = Field(default=10, gt=0)
    gateway_jwks_interval_s: float = Field(default=300, gt=0)
    gateway_jwks_timeout_ms: int = Field(default=2_000, ge=1)
    gateway_readiness_ttl_s: float = Field(default=1, gt=0)
    gateway_usage_queue_max: int = Field(default=10_000, ge=1)

    @property
    def is_public_tls(self) -> bool:
        return self.public_url.startswith("https://")

    @field_validator("gateway_weights")
    @classmethod
    def _names_routes(cls, weights: dict[str, int]) -> dict[str, int]:
        if unknown := weights.keys() - {route.prefix for route in ROUTES}:
            raise ValueError(f"no such route: {', '.join(sorted(unknown))}")
        return weights

    @property
    def user_limits(self) -> Limits:
        return Limits(
            self.gateway_user_per_minute,
            self.gateway_user_per_hour,
            self.gateway_user_per_day,
            self.gateway_user_concurrency,
        )

    @property
    def anonymous_limits(self) -> Limits:
        """No day: an address that came once leaves a hundred bytes for an hour."""
        return Limits(self.gateway_anonymous_per_minute, self.gateway_anonymous_per_hour, None)

    @property
    def user_ceiling(self) -> Limits | None:
        return self._ceiling("user")

    @property
    def organization_ceiling(self) -> Limits | None:
        return self._ceiling("organization")

    def _ceiling(self, whose: str) -> Limits | None:
        prefix = f"gateway_{whose}_ceiling"
        figures = {name: getattr(self, f"{prefix}_per_{name}") for name in ("minute", "hour", "day")}
        return Limits.ceiling({**figures, "concurrency": getattr(self, f"{prefix}_concurrency")})
