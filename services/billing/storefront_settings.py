"""What the REST side of billing reads from the environment."""

from __future__ import annotations

from pydantic import Field

from shared.runtime import ServiceSettings


class StorefrontSettings(ServiceSettings):
    """A part of billing's settings; secrets do not print."""

    billing_exports_max: int = Field(default=4, ge=1)  # streams of a whole history at once, of one process
