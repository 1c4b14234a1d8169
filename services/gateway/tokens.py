"""Access tokens: JWT, ES256 only, verified against auth's JWKS; a verified token is remembered until it expires.

The key set is fetched from auth, refreshed in the background, and once more when a token names an unknown key: up to
`refetches_max` times in a row, and then every `refetch_interval_s`. While auth is away the last set goes on serving.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from jose import JWTError, jwt

from services.gateway.caches import BoundedCache
from services.gateway.guesses import Guesses
from services.gateway.replicas import Upstream
from shared import access_tokens
from shared.access_tokens import ALGORITHM, AUDIENCE, ISSUER, JWKS_PATH, TOKEN_TYPE
from shared.clock import Clock
from shared.errors import Unauthenticated, Unavailable
from shared.identity import Identity
from shared.telemetry import get_logger

log = get_logger(__name__)

JWKS_BYTES_MAX = 64 * 1024
JWKS_KEYS_MAX = 32


class KeySetUnavailable(Exception):
    """Auth did not give a usable key set."""


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What a verified token says; `version` is its session's when it was made."""

    identity: Identity
    expires_at_s: float
    version: int
    csrf: str = ""  # of tokens for cookies: the digest of what must come in x-csrf-token

    @property
    def version_name(self) -> str:
        """Redis: where the session's present version stands."""
        return access_tokens.version_name(self.identity.org_id, self.identity.session_id)


class JsonWebKeySet:
    """Auth's public signing keys by `kid`."""

    def __init__(
        self,
        auth: Upstream,
        clock: Clock,
        *,
        timeout_ms: int = 2_000,
        refetch_interval_s: float = 5,
        refetches_max: int = 3,
    ) -> None:
        self._auth = auth
        self._clock = clock
        self._timeout_s = timeout_ms / 1000
        self._refetch_interval_s = refetch_interval_s
        self._refetches_max = refetches_max
        self._refetches_left = float(refetches_max)
        self._refilled_at_s = clock.monotonic_s()
        self._keys: dict[str, dict[str, Any]] = {}
        self._fetched_at_s = float("-inf")
        self._fetching = asyncio.Lock()

    async def key(self, kid: str) -> dict[str, Any] | None:
        """The key of that name, or None. Raises Unavailable while no set was ever fetched."""
        if kid in self._keys:
            return self._keys[kid]
        asked_at_s = self._clock.monotonic_s()
        async with self._fetching:
            if kid not in self._keys and self._fetched_at_s < asked_at_s and self._may_refetch():
                try:
                    await self._fetch()
                except KeySetUnavailable as e:
                    log.warning("jwks_fetch_failed", detail=str(e))
        if not self._keys:
            raise Unavailable("Tokens cannot be checked right now. Retry.", retry_after_s=1)
        return self._keys.get(kid)

    async def fetch(self) -> None:
        """Replace the set by auth's present one. Raises KeySetUnavailable and keeps the old one."""
        async with self._fetching:
            await self._fetch()

    def _may_refetch(self) -> bool:
        """Draw on the refetches that unknown keys have; the background's own do not count."""
        now_s = self._clock.monotonic_s()
        refilled = (now_s - self._refilled_at_s) / self._refetch_interval_s
        self._refetches_left = min(self._refetches_left + refilled, self._refetches_max)
        self._refilled_at_s = now_s
        if self._refetches_left < 1:
            return False
        self._refetches_left -= 1
        return True

    async def _fetch(self) -> None:
        self._fetched_at_s = self._clock.monotonic_s()
        try:
            status, body = await self._auth.fetch(JWKS_PATH, bytes_max=JWKS_BYTES_MAX, timeout_s=self._timeout_s)
        except Unavailable as e:
            raise KeySetUnavailable(e.detail or e.code) from e
        if status != 200:
            raise KeySetUnavailable(f"status {status}")
        self._keys = parse_key_set(body)


def parse_key_set(body: bytes) -> dict[str, dict[str, Any]]:
    """The P-256 keys of a JWKS by `kid`; others are left out. Raises KeySetUnavailable when none remains."""
    try:
        keys = json.loads(body)["keys"]
        found = {
            key["kid"]: {name: key[name] for name in ("kty", "crv", "x", "y")} | {"alg": ALGORITHM}
            for key in keys[:JWKS_KEYS_MAX]
            if key.get("kty") == "EC" and key.get("crv") == "P-256" and key.get("alg", ALGORITHM) == ALGORITHM
        }
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise KeySetUnavailable("not a key set") from e
    if not found:
        raise KeySetUnavailable("no ES256 key")
    return found


class AccessTokens:
    """Verifies tokens, and remembers up to `entries_max` of them by their digest.

    `guesses` bounds how often one address may make us verify a signature for nothing.
    """

    def __init__(
        self,
        key_set: JsonWebKeySet,
        clock: Clock,
        guesses: Guesses,
        *,
        entries_max: int = 10_000,
        ttl_s: float = 60,
    ) -> None:
        self._key_set = key_set
        self._guesses = guesses
        self._clock = clock
        self._verified: BoundedCache[bytes, AccessToken] = BoundedCache(clock, entries_max=entries_max, ttl_s=ttl_s)

    async def verify(self, token: str, address: str) -> AccessToken:
        """What a token says that auth signed and that is not over; whether its session still stands, others know.

        Raises Unauthenticated, the same for every cause; Unavailable; RateLimited for an address that only guesses.
        """
        digest = hashlib.sha256(token.encode()).digest()
        known = self._verified.get(digest)
        if known is None:
            with self._guesses.attempt(address):
                known = _access_token(await self._claims(token))
            self._verified.put(digest, known)
        if known.expires_at_s <= self._clock.now().timestamp():
            raise Unauthenticated()
        return known

    async def _claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            kid = header.get("kid")
            if header.get("alg") != ALGORITHM or not isinstance(kid, str):
                raise Unauthenticated()
            key = await self._key_set.key(kid)
            if key is None:
                raise Unauthenticated()
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                # Expiry is judged by our clock at every use; its presence is demanded here.
                options={
                    "verify_exp": False,
                    "verify_at_hash": False,
                    **{f"require_{name}": True for name in ("aud", "iat", "exp", "iss", "sub")},
                },
            )
        except JWTError as e:
            raise Unauthenticated() from e
        if claims.get("type") != TOKEN_TYPE:
            raise Unauthenticated()
        return claims


def _access_token(claims: dict[str, Any]) -> AccessToken:
    try:
        roles = tuple(str(role) for role in claims["roles"])
        user_id, org_id, session_id = (str(UUID(claims[name])) for name in ("sub", "org", "sid"))
        identity = Identity(
            kind="user",
            user_id=user_id,
            org_id=org_id,
            session_id=session_id,
            plan=str(claims.get("plan", "default")),
            roles=roles,
            scopes=tuple(claims["scope"].split()),
            limit_id=f"user-{user_id}",
        )
        return AccessToken(identity, float(claims["exp"]), int(claims["ver"]), str(claims.get("csrf", "")))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise Unauthenticated() from e
