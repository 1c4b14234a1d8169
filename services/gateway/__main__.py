"""`python -m services.gateway`: serve until told to stop."""

from __future__ import annotations

from services.gateway.app import SERVICE, build
from services.gateway.settings import GatewaySettings
from shared.runtime import main

if __name__ == "__main__":
    main(SERVICE, GatewaySettings, build)
