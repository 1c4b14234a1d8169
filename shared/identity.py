"""Who asks: one signed internal header that the gateway sets and services trust.

    x-tollgate-identity: v1.<kid>.<base64url(JSON claims)>.<base64url(HMAC-SHA-256 over "v1.<kid>.<claims>")>

The key ring is TOLLGATE_IDENTITY_KEYS = "kid:base64secret[,kid2:…]": the first key signs, all verify, so that keys
rotate without a gap. A header lives 60 s; it is made for one request and never leaves the internal network (the
gateway strips it from whatever comes from outside). The same token, kind `service`, authenticates gRPC calls.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shared.clock import Clock
from shared.errors import PermissionDenied, Unauthenticated

HEADER = "x-tollgate-identity"
LIFETIME_S = 60
CLOCK_SKEW_S = 5
SECRET_BYTES_MIN = 32
TOKEN_CHARS_MAX = 32_768  # a key may name many models; the gateway's and services' heads hold twice that

Kind = Literal["key", "user", "anonymous", "service"]
_KINDS = ("key", "user", "anonymous", "service")


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller of a request.

    `scopes` and `roles` are checked with `require_scope` and `require_role`; `models` None means all models;
    `tokens_per_minute` 0 means no token limit; ids are empty where they do not apply.
    """

    kind: Kind
    user_id: str = ""
    org_id: str = ""
    key_id: str = ""
    session_id: str = ""
    service: str = ""
    plan: str = "default"
    roles: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    tokens_per_minute: int = 0
    limit_id: str = ""
    address: str = field(default="", compare=False)

    @property
    def is_authenticated(self) -> bool:
        return self.kind in ("key", "user")

    def has_scope(self, scope: str) -> bool:
        """Whether a scope is held: itself, or `*`."""
        return scope in self.scopes or "*" in self.scopes

    def require_scope(self, scope: str) -> None:
        """Raise Unauthenticated for nobody, PermissionDenied for somebody without the scope."""
        if not self.is_authenticated:
            raise Unauthenticated()
        if not self.has_scope(scope):
            raise PermissionDenied(f"This needs the scope {scope}.", code="insufficient_scope")

    def require_role(self, *roles: str) -> None:
        """Raise unless one of the roles is held. A key carries its owner's roles only with the scope `admin`."""
        if not self.is_authenticated:
            raise Unauthenticated()
        if self.kind == "key" and not self.has_scope("admin"):
            raise PermissionDenied("This needs a key with the scope admin.", code="insufficient_scope")
        if not set(roles) & set(self.roles):
            raise PermissionDenied(f"This needs the role {' or '.join(roles)}.", code="insufficient_role")


class IdentityRing:
    """Signs and verifies identities. Build it once from the setting; it holds no other state."""

    def __init__(self, setting: str, clock: Clock) -> None:
        self._keys = parse_key_ring(setting)
        self._current = next(iter(self._keys))
        self._clock = clock

    def sign(self, identity: Identity) -> str:
        """The header's value, valid for LIFETIME_S from now."""
        now = int(self._clock.now().timestamp())
        claims = {k: v for k, v in asdict(identity).items() if v}
        if identity.models is not None:  # an empty list means "no model", not "every model"
            claims["models"] = identity.models
        claims |= {"iat": now, "exp": now + LIFETIME_S}
        payload = _b64encode(json.dumps(claims, separators=(",", ":")).encode())
        signed = f"v1.{self._current}.{payload}"
        token = f"{signed}.{_b64encode(self._mac(self._keys[self._current], signed))}"
        assert len(token) <= TOKEN_CHARS_MAX, "an identity outgrew what verify accepts"
        return token

    def verify(self, token: str | None) -> Identity:
        """The identity in a header. Raises Unauthenticated for anything but a valid, fresh one of ours."""
        refused = Unauthenticated("This address answers only to the gateway.", code="invalid_identity")
        if not token or len(token) > TOKEN_CHARS_MAX:
            raise refused
        parts = token.split(".")
        if len(parts) != 4 or parts[0] != "v1" or parts[1] not in self._keys:
            raise refused
        expected = self._mac(self._keys[parts[1]], ".".join(parts[:3]))
        try:
            if not hmac.compare_digest(expected, _b64decode(parts[3])):
                raise refused
            claims = json.loads(_b64decode(parts[2]))
        except (ValueError, binascii.Error) as e:
            raise refused from e
        now = self._clock.now().timestamp()
        if not claims["iat"] - CLOCK_SKEW_S <= now < claims["exp"] + CLOCK_SKEW_S:
            raise refused
        return _identity(claims)

    @staticmethod
    def _mac(secret: bytes, signed: str) -> bytes:
        return hmac.new(secret, signed.encode(), hashlib.sha256).digest()


def parse_key_ring(setting: str) -> dict[str, bytes]:
    """`"kid:base64[,…]"` → {kid: secret}, order kept. Raises ValueError that names the kid, never the secret."""
    keys: dict[str, bytes] = {}
    for part in filter(None, (p.strip() for p in setting.split(","))):
        kid, _, encoded = part.partition(":")
        try:
            secret = base64.b64decode(encoded, validate=True)
        except binascii.Error as e:
            raise ValueError(f"key {kid!r} is not base64") from e
        if not kid or not kid.isalnum() or len(secret) < SECRET_BYTES_MIN:
            raise ValueError(f"key {kid!r} needs an alphanumeric id and at least {SECRET_BYTES_MIN} bytes")
        keys[kid] = secret
    if not keys:
        raise ValueError("the key ring is empty; it wants kid:base64secret")
    return keys


def _identity(claims: dict[str, Any]) -> Identity:
    if claims.get("kind") not in _KINDS:
        raise Unauthenticated("This address answers only to the gateway.", code="invalid_identity")
    models = claims.get("models")
    return Identity(
        kind=claims["kind"],
        user_id=claims.get("user_id", ""),
        org_id=claims.get("org_id", ""),
        key_id=claims.get("key_id", ""),
        session_id=claims.get("session_id", ""),
        service=claims.get("service", ""),
        plan=claims.get("plan", "default"),
        roles=tuple(claims.get("roles", ())),
        scopes=tuple(claims.get("scopes", ())),
        models=None if models is None else tuple(models),
        tokens_per_minute=claims.get("tokens_per_minute", 0),
        limit_id=claims.get("limit_id", ""),
        address=claims.get("address", ""),
    )


def _b64encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _b64decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
