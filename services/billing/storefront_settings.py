"""What the REST side of billing reads from the environment."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator

from services.billing.domain import parse_credits
from shared.errors import TollgateError
from shared.identity import parse_key_ring
from shared.runtime import ServiceSettings


class StorefrontSettings(ServiceSettings):
    """A part of billing's settings; secrets do not print."""

    public_url: str = "http://127.0.0.1:8080"

    billing_exports_max: int = Field(default=4, ge=1)  # streams of a whole history at once, of one process

    # Credits are sold when both of Stripe's secrets are there.
    stripe_secret_key: SecretStr | None = None
    stripe_webhook_secret: SecretStr | None = None
    stripe_api_url: str = "https://api.stripe.com"
    stripe_timeout_s: float = Field(default=10, gt=0)
    stripe_retries_max: int = Field(default=2, ge=0, le=5)
    topup_currency: str = Field(default="usd", pattern=r"^[a-z]{3}$")
    topup_price_minor: str = "1"  # of one credit, in the currency's smallest unit (cents)
    topup_credits_min: str = "100"
    topup_credits_max: str = "1000000"
    billing_topup_watch_interval_s: float = Field(default=30, gt=0)
    billing_topup_unchecked_s: float = Field(default=300, gt=0)  # then the provider is asked how a payment stands

    # kid:base64[,…]: secrets of webhooks are derived from these. Without them there are none.
    billing_secret_keys: SecretStr | None = None
    billing_webhook_private: bool = False  # http, and addresses within the network: for development only
    billing_webhook_timeout_s: float = Field(default=10, gt=0)
    billing_webhook_retries_s: tuple[float, ...] = (5, 300, 1_800, 7_200, 18_000, 36_000, 36_000)
    billing_webhooks_in_flight_max: int = Field(default=16, ge=1)
    billing_webhooks_per_endpoint_max: int = Field(default=2, ge=1)
    billing_webhook_interval_s: float = Field(default=1, gt=0)
    billing_webhook_kept_s: float = Field(default=30 * 24 * 3_600, gt=0)
    billing_alert_interval_s: float = Field(default=5, gt=0)

    @field_validator("billing_secret_keys", "stripe_secret_key", "stripe_webhook_secret", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None

    @field_validator("billing_secret_keys")
    @classmethod
    def _is_a_key_ring(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_key_ring(value.get_secret_value())
        return value

    @field_validator("topup_price_minor", "topup_credits_min", "topup_credits_max")
    @classmethod
    def _is_decimal(cls, value: str) -> str:
        try:
            parse_credits(value)
        except TollgateError as e:
            raise ValueError(e.message) from None
        return value
