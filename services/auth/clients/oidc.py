"""OpenID Connect, as a relying party: discovery, authorization code with PKCE, the ID token and what it claims."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from services.auth.domain.fields import has_control_characters
from services.auth.domain.oidc import ExternalPerson, OidcFlow, OidcProvider
from services.auth.errors import OidcRefused, OidcUnavailable
from shared.clock import Clock

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
CACHE_S = 3_600
LEEWAY_S = 60
CLAIM_CHARS_MAX = 254
ENDPOINTS = ("authorization_endpoint", "token_endpoint", "jwks_uri")


class OidcClient:
    """One provider. `redirect_uri` is where it sends people back to."""

    def __init__(
        self, provider: OidcProvider, redirect_uri: str, http: httpx.AsyncClient, clock: Clock, timeout_s: float
    ) -> None:
        self.provider = provider
        self._redirect_uri = redirect_uri
        self._http = http
        self._clock = clock
        self._timeout_s = timeout_s
        self._fetching = asyncio.Lock()
        self._found: tuple[float, dict[str, Any], KeySet] | None = None

    async def authorization_url(self, flow: OidcFlow, state: str) -> str:
        """Where to send the person. Raises OidcUnavailable."""
        metadata, _ = await self._discovered()
        async with self._oauth() as oauth:
            url, _ = oauth.create_authorization_url(
                metadata["authorization_endpoint"], state=state, nonce=flow.nonce, code_verifier=flow.verifier
            )
        return str(url)

    async def person(self, flow: OidcFlow, code: str) -> ExternalPerson:
        """Whom the code stands for. Raises OidcRefused, OidcUnavailable."""
        metadata, _ = await self._discovered()
        try:
            async with self._oauth() as oauth:
                token = await oauth.fetch_token(metadata["token_endpoint"], code=code, code_verifier=flow.verifier)
        except (AuthlibBaseError, ValueError) as e:
            raise OidcRefused(detail=f"token endpoint: {type(e).__name__}") from e
        except httpx.HTTPError as e:
            raise OidcUnavailable(detail=f"token endpoint: {type(e).__name__}", retry_after_s=1) from e
        claims = await self._claims(str(token.get("id_token", "")), flow.nonce)
        if "email" not in claims and "userinfo_endpoint" in metadata:
            claims = {**await self._user_info(metadata["userinfo_endpoint"], token, claims), **claims}
        return self._person(claims)

    async def _claims(self, id_token: str, nonce: str) -> dict[str, Any]:
        registry = jwt.JWTClaimsRegistry(
            now=int(self._clock.now().timestamp()),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self.provider.issuer},
            aud={"essential": True, "value": self.provider.client_id},
            nonce={"essential": True, "value": nonce},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )
        for attempt in range(2):
            _, keys = await self._discovered(again=attempt > 0)
            try:
                claims: dict[str, Any] = jwt.decode(id_token, keys, algorithms=ALGORITHMS).claims
                registry.validate(claims)
            except (JoseError, ValueError) as e:  # the provider may have rotated its keys: once more with fresh ones
                if attempt:
                    raise OidcRefused(detail=f"id token: {type(e).__name__}") from e
            else:
                if isinstance(claims["aud"], list) and len(claims["aud"]) > 1 and claims.get("azp") != self._client_id:
                    raise OidcRefused(detail="id token: azp")
                return claims
        raise AssertionError("unreachable")

    async def _user_info(self, url: str, token: dict[str, Any], claims: dict[str, Any]) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {token.get('access_token', '')}"}
        info = await self._get(url, headers)
        if info.get("sub") != claims["sub"]:
            raise OidcRefused(detail="userinfo: sub")
        return info

    def _person(self, claims: dict[str, Any]) -> ExternalPerson:
        texts = [claims.get(name) for name in ("sub", "email", "preferred_username")]
        subject, email, username = (_text(value) for value in texts)
        if not subject:
            raise OidcRefused(detail="id token: sub")
        verified = claims.get("email_verified") in (True, "true")
        return ExternalPerson(self.provider.issuer, subject, email, verified, username or email or "user")

    @property
    def _client_id(self) -> str:
        return self.provider.client_id

    def _oauth(self) -> AsyncOAuth2Client:
        return AsyncOAuth2Client(
            client_id=self._client_id,
            client_secret=self.provider.client_secret.get_secret_value(),
            scope=self.provider.scope,
            redirect_uri=self._redirect_uri,
            code_challenge_method="S256",
            timeout=self._timeout_s,
            trust_env=False,
        )

    async def _discovered(self, *, again: bool = False) -> tuple[dict[str, Any], KeySet]:
        """The provider's metadata and keys; remembered for CACHE_S."""
        async with self._fetching:
            now_s = self._clock.monotonic_s()
            if self._found is None or again or self._found[0] + CACHE_S <= now_s:
                metadata = await self._get(f"{self.provider.issuer.rstrip('/')}/.well-known/openid-configuration", {})
                if metadata.get("issuer") != self.provider.issuer or not all(metadata.get(n) for n in ENDPOINTS):
                    raise OidcUnavailable(detail="discovery: not this issuer's")
                try:
                    keys = KeySet.import_key_set(await self._get(metadata["jwks_uri"], {}))  # type: ignore[arg-type]
                except (JoseError, ValueError, KeyError) as e:
                    raise OidcUnavailable(detail="jwks: not a key set") from e
                self._found = (now_s, metadata, keys)
            return self._found[1], self._found[2]

    async def _get(self, url: str, headers: dict[str, str]) -> dict[str, Any]:
        try:
            response = await self._http.get(url, headers=headers)
            response.raise_for_status()
            found = response.json()
        except (httpx.HTTPError, ValueError) as e:
            raise OidcUnavailable(detail=type(e).__name__, retry_after_s=1) from e
        if not isinstance(found, dict):
            raise OidcUnavailable(detail="not an object")
        return found


def _text(value: object) -> str:
    """A claim, if it is a text that we keep: printable and of a decent length."""
    if isinstance(value, str) and len(value) <= CLAIM_CHARS_MAX and not has_control_characters(value):
        return value
    return ""
