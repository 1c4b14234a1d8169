"""The one table of what goes where, and who may use it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Access(Enum):
    """Who may use a route."""

    PUBLIC = "public"  # anyone, limited by address
    SCOPE = "scope"  # key or token with the route's scope
    SESSION = "session"  # an access token, or a key with the scope admin
    ADMIN = "admin"  # scope admin, and the role operator or admin


@dataclass(frozen=True, slots=True)
class Route:
    """Paths that begin with `prefix` (or are it, when `exact`) belong to `service`.

    `read_scope` is asked for on GET, `scope` on everything else; `weight` is what a request draws from its limits.
    """

    prefix: str
    service: str
    access: Access = Access.SCOPE
    scope: str = ""
    read_scope: str = ""
    methods: frozenset[str] = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE"))
    exact: bool = False
    weight: int = 1

    def required_scope(self, method: str) -> str:
        return self.read_scope if method == "GET" and self.read_scope else self.scope


GET = frozenset(("GET",))
POST = frozenset(("POST",))

ROUTES: tuple[Route, ...] = (
    Route("/v1/chat/completions", "chat", scope="chat", methods=GET | POST, exact=True),
    Route("/v1/chat/", "chat", scope="chat"),
    Route("/v1/completions", "chat", scope="chat", methods=POST, exact=True),
    Route("/v1/responses", "chat", scope="chat"),
    Route("/v1/tokenize", "chat", scope="chat", methods=POST, exact=True),
    Route("/chat/message", "chat", scope="chat", methods=POST, exact=True),
    Route("/v1/models", "chat", scope="models", methods=GET),
    Route("/v1/embeddings", "inference", scope="inference", methods=POST, exact=True),
    Route("/v1/rerank", "inference", scope="inference", methods=POST, exact=True),
    Route("/api/v1/auth/register", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/login", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/refresh", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/verify-email", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/password/forgot", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/password/reset", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/oidc", "auth", Access.PUBLIC, methods=GET),
    Route("/api/v1/auth/", "auth", Access.SESSION),
    Route("/api/v1/keys/leaked", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/keys", "auth", scope="keys:write", read_scope="keys:read"),
    Route("/api/v1/organizations", "auth", Access.SESSION),
    Route("/api/v1/billing/payments/stripe/webhook", "billing", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/billing/", "billing", scope="billing:write", read_scope="billing:read"),
    Route("/billing/", "billing", scope="billing:write", read_scope="billing:read"),
    Route("/api/v1/admin/auth/", "auth", Access.ADMIN, scope="admin"),
    Route("/api/v1/admin/billing/", "billing", Access.ADMIN, scope="admin"),
    Route("/api/v1/admin/inference/", "inference", Access.ADMIN, scope="admin"),
    Route("/.well-known/jwks.json", "auth", Access.PUBLIC, methods=GET, exact=True),
)


class RouteTable:
    """Finds the route of a path: an exact one, else the longest prefix that ends at a slash or at the path's end."""

    def __init__(self, routes: tuple[Route, ...] = ROUTES) -> None:
        self._exact: dict[str, Route] = {route.prefix: route for route in routes}
        self._prefixes = sorted(
            ((r.prefix.rstrip("/") + "/", r) for r in routes if not r.exact), key=lambda pair: -len(pair[0])
        )

    def find(self, path: str) -> Route | None:
        """The route that owns a path, or None."""
        if (route := self._exact.get(path)) is not None:
            return route
        for prefix, route in self._prefixes:
            if path.startswith(prefix):
                return route
        return None
