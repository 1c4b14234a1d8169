"""The one table of what goes where, and the replicas behind each name.

A request goes to the replica with the fewest requests outstanding, in turn among equals; one that refused a
connection is passed over for a moment while another is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from shared.clock import Clock
from shared.errors import MethodNotAllowed, NotFound

REFUSED_PAUSE_S = 1.0


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
    Route("/v1/chat/completions", "chat", scope="chat", methods=POST, exact=True),
    Route("/v1/chat/", "chat", scope="chat"),
    Route("/v1/completions", "chat", scope="chat", methods=POST, exact=True),
    Route("/v1/responses", "chat", scope="chat"),
    Route("/v1/models", "chat", scope="models", methods=GET),
    Route("/v1/embeddings", "inference", scope="inference", methods=POST, exact=True),
    Route("/v1/rerank", "inference", scope="inference", methods=POST, exact=True),
    Route("/api/v1/auth/register", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/login", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/refresh", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/auth/", "auth", Access.SESSION),
    Route("/api/v1/keys/leaked", "auth", Access.PUBLIC, methods=POST, exact=True),
    Route("/api/v1/keys", "auth", scope="keys:write", read_scope="keys:read"),
    Route("/api/v1/organizations", "auth", Access.SESSION),
    Route("/api/v1/billing/", "billing", scope="billing:write", read_scope="billing:read"),
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

    def match(self, method: str, path: str) -> Route:
        """The route of a request. Raises NotFound or MethodNotAllowed."""
        route = self.find(path)
        if route is None:
            raise NotFound()
        if method not in route.methods:
            raise MethodNotAllowed(headers={"allow": ", ".join(sorted(route.methods))})
        return route


@dataclass(slots=True, eq=False)
class Replica:
    """One process of a service. `outstanding` counts the requests that it is answering for us."""

    url: str
    outstanding: int = 0
    paused_until_s: float = float("-inf")


@dataclass(slots=True, eq=False)
class Upstream:
    """A service and its replicas."""

    name: str
    replicas: list[Replica]
    clock: Clock
    _turn: int = field(default=0)

    def pick(self) -> Replica:
        """The replica to try first."""
        return next(self.attempts())

    def attempts(self) -> Iterator[Replica]:
        """Every replica once, the best first; the order is made when the first is asked for."""
        self._turn += 1
        count = len(self.replicas)
        in_turn = [self.replicas[(self._turn + i) % count] for i in range(count)]
        now_s = self.clock.monotonic_s()
        yield from sorted(in_turn, key=lambda r: (r.paused_until_s > now_s, r.outstanding))

    def pause(self, replica: Replica) -> None:
        """It refused a connection: others first, for a moment."""
        replica.paused_until_s = self.clock.monotonic_s() + REFUSED_PAUSE_S


def create_upstreams(urls: Mapping[str, str], clock: Clock) -> dict[str, Upstream]:
    """From settings: service name → URLs, separated by commas. Raises ValueError for none."""
    upstreams = {}
    for name, setting in urls.items():
        replicas = [Replica(url.strip().rstrip("/")) for url in setting.split(",") if url.strip()]
        if not replicas or not all(r.url.startswith(("http://", "https://")) for r in replicas):
            raise ValueError(f"the service {name} needs at least one http(s) URL")
        upstreams[name] = Upstream(name, replicas, clock)
    return upstreams
