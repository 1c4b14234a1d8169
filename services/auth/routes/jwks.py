"""The public keys of access tokens, for the gateway and for anyone else who verifies them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from services.auth.routes.dependencies import AllServices

CACHE_S = 60

router = APIRouter(tags=["auth"])


@router.get("/.well-known/jwks.json", summary="Public keys of access tokens")
async def jwks(services: AllServices, response: Response) -> dict[str, Any]:
    """A JSON Web Key Set (RFC 7517). ES256; choose by `kid`. Public, so it asks for no identity."""
    response.headers["cache-control"] = f"public, max-age={CACHE_S}"
    return services.signing_keys.jwks()
