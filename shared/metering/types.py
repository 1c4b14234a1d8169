"""What metering is given and what it gives: limits, tokens, receipts, prices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeteringLimits:
    """Every wait of the client. Times in the unit of their name."""

    hold_ttl_ms: int = 30_000
    first_heartbeat_ms: int = 1_000
    hold_life_max_s: float = 3_600.0
    call_timeout_s: float = 2.0
    operations_pending_max: int = 10_000
    message_operations_max: int = 1_000
    hold_timeout_s: float = 4.0
    settle_wait_s: float = 5.0
    resolution_timeout_s: float = 300.0
    resolutions_pending_max: int = 10_000
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request so far. `input_tokens` includes the cached ones."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0

    def at_least(self, other: Usage) -> Usage:
        """The larger of both, class by class: usage never shrinks."""
        return Usage(
            max(self.input_tokens, other.input_tokens),
            max(self.cached_input_tokens, other.cached_input_tokens),
            max(self.output_tokens, other.output_tokens),
        )


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a settlement came to, in nano-credits. `receivable_nano` is what the wallet owes in all."""

    cost_nano: int
    settled_nano: int
    receivable_nano: int
    available_nano: int


@dataclass(frozen=True, slots=True)
class Price:
    """A price in force: nano-credits per request and per million tokens."""

    price_id: str
    model: str
    customer_class: str
    per_request_nano: int
    input_nano_per_million: int
    cached_input_nano_per_million: int
    output_nano_per_million: int
