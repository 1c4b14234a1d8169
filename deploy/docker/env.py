"""Random secrets for docker-compose.yml: `python3 -m deploy.docker.env >> .env`, once for each installation.

Everything that the compose file demands and that nobody needs to choose. Passwords are hexadecimal, because they are
part of URLs. Running it again makes new secrets: what was written with the old ones (database roles, API keys, signing
keys, Unleash's tokens) does not follow by itself.
"""

from __future__ import annotations

import base64
import secrets
import sys
from collections.abc import Iterator

PASSWORDS = (
    "POSTGRES_SUPERUSER_PASSWORD",
    "POSTGRES_OWNER_PASSWORD",
    "POSTGRES_AUTH_PASSWORD",
    "POSTGRES_BILLING_PASSWORD",
    "POSTGRES_CHAT_PASSWORD",
    "POSTGRES_GATEWAY_PASSWORD",
    "POSTGRES_UNLEASH_PASSWORD",
    "VALKEY_PASSWORD",
    "UNLEASH_SESSION_SECRET",
    "UNLEASH_ADMIN_PASSWORD",
    "GRAFANA_ADMIN_PASSWORD",
)
# Unleash reads the part before the dot as <projects>:<environment>.
UNLEASH_TOKENS = {"UNLEASH_ADMIN_TOKEN": "*:*", "UNLEASH_CLIENT_TOKEN": "default:production"}


def generate() -> Iterator[tuple[str, str]]:
    """Name and value of each secret, new ones each time."""
    for name in PASSWORDS:
        yield name, secrets.token_hex(24)
    for name, scope in UNLEASH_TOKENS.items():
        yield name, f"{scope}.{secrets.token_hex(28)}"
    yield "TOLLGATE_IDENTITY_KEYS", f"k1:{_key()}"
    yield "TOLLGATE_API_KEY_PEPPERS", f"1:{_key()}"
    yield "TOLLGATE_AUTH_SECRET_KEY", _key()
    yield "TOLLGATE_BILLING_SECRET_KEYS", f"k1:{_key()}"


def _key() -> str:
    """256 bits in base64."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}={value}\n" for name, value in generate())
