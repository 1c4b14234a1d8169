"""One OpenAPI document out of the services' own: only public paths, one set of security schemes, no name clashes.

The merged document is kept for `ttl_s`. A service that does not answer keeps the part that it gave last; one that
never answered is left out until it does, and the document without it is kept for INCOMPLETE_TTL_S only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from services.gateway.caches import BoundedCache
from services.gateway.replicas import Upstream
from services.gateway.upstreams import Access, Route, RouteTable
from shared.clock import Clock
from shared.errors import Unavailable
from shared.telemetry import get_logger

log = get_logger(__name__)

DOCUMENT_BYTES_MAX = 4 * 1024 * 1024
INCOMPLETE_TTL_S = 5.0
VERBS = ("get", "post", "put", "patch", "delete")
REF_PREFIX = "#/components/"
DESCRIPTION = (
    "An OpenAI-compatible API over the operator's own models, with API keys, exact limits and prepaid credits. "
    "Requests carry an API key (`tg_live_…`) or an access token in `Authorization: Bearer`."
)
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key or an access token."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
    "accessToken": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "The access_token of POST /api/v1/auth/login.",
    },
}


class OpenApi:
    """See the module."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, Upstream],
        routes: RouteTable,
        public_url: str,
        version: str,
        clock: Clock,
        ttl_s: float = 60,
        timeout_ms: int = 1_000,
    ) -> None:
        self._upstreams = upstreams
        self._routes = routes
        self._public_url = public_url
        self._version = version
        self._timeout_s = timeout_ms / 1000
        self._last: dict[str, dict[str, Any]] = {}
        self._merged: BoundedCache[str, bytes] = BoundedCache(clock, entries_max=1, ttl_s=ttl_s)
        self._incomplete: BoundedCache[str, bytes] = BoundedCache(clock, entries_max=1, ttl_s=INCOMPLETE_TTL_S)
        self._merging = asyncio.Lock()

    async def document(self) -> bytes:
        """The merged document as JSON."""
        async with self._merging:
            if (merged := self._merged.get("") or self._incomplete.get("")) is None:
                parts = await asyncio.gather(*(self._part(u) for u in self._upstreams.values()))
                known = {name: part for name, part in zip(self._upstreams, parts, strict=True) if part is not None}
                document = merge(known, self._routes, public_url=self._public_url, version=self._version)
                merged = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
                is_complete = len(known) == len(self._upstreams)
                (self._merged if is_complete else self._incomplete).put("", merged)
            return merged

    async def _part(self, upstream: Upstream) -> dict[str, Any] | None:
        try:
            status, body = await upstream.fetch(
                "/openapi.json", bytes_max=DOCUMENT_BYTES_MAX, timeout_s=self._timeout_s
            )
            document = json.loads(body) if status == 200 else None
            if isinstance(document, dict) and isinstance(document.get("paths"), dict):
                self._last[upstream.name] = document
        except (Unavailable, ValueError) as e:
            log.warning("openapi_part_missing", upstream=upstream.name, detail=type(e).__name__)
        return self._last.get(upstream.name)


def merge(parts: Mapping[str, dict[str, Any]], routes: RouteTable, *, public_url: str, version: str) -> dict[str, Any]:
    """One document: the paths that the route table gives to each service, and the components that they name."""
    paths: dict[str, Any] = {}
    components: dict[str, dict[str, Any]] = {}
    tags: list[dict[str, str]] = []
    for service, part in sorted(parts.items()):
        own = {
            path: item
            for path, item in part["paths"].items()
            if (route := routes.find(path)) is not None and route.service == service
        }
        if not own:
            continue
        renamed = _adopt_components(service, part.get("components", {}), components)
        tags.append({"name": service, "description": str(part.get("info", {}).get("description", ""))})
        for path, item in sorted(own.items()):
            route = routes.find(path)
            assert route is not None
            paths[path] = _operations(_with_refs(item, renamed), service, route)
    components["securitySchemes"] = dict(SECURITY_SCHEMES)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tollgate", "version": version, "description": DESCRIPTION},
        "servers": [{"url": public_url}],
        "tags": tags,
        "paths": paths,
        "components": components,
    }


def _adopt_components(service: str, offered: Mapping[str, Any], adopted: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Add a service's components; one whose name another took for something else gets the service's name before it."""
    renamed: dict[str, str] = {}
    sections = {k: v for k, v in offered.items() if k != "securitySchemes" and isinstance(v, dict)}
    for section, entries in sections.items():
        for name, value in entries.items():
            if adopted.get(section, {}).get(name, value) != value:
                renamed[f"{REF_PREFIX}{section}/{name}"] = f"{REF_PREFIX}{section}/{service.capitalize()}{name}"
    for section, entries in sections.items():
        for name, value in entries.items():
            target = renamed.get(f"{REF_PREFIX}{section}/{name}", f"/{name}").rpartition("/")[2]
            adopted.setdefault(section, {})[target] = _with_refs(value, renamed)
    return renamed


def _with_refs(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            k: renamed.get(v, v) if k == "$ref" and isinstance(v, str) else _with_refs(v, renamed)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_with_refs(v, renamed) for v in value]
    return value


def _operations(item: Mapping[str, Any], service: str, route: Route) -> dict[str, Any]:
    """The operations that the gateway lets through, each with what it asks for and a name of its own."""
    operations: dict[str, Any] = {k: v for k, v in item.items() if k not in VERBS}
    for verb in VERBS:
        if verb not in item or verb.upper() not in route.methods:
            continue
        operation = {k: v for k, v in item[verb].items() if k not in ("security", "tags")}
        if operation.get("operationId"):
            operation["operationId"] = f"{service}_{operation['operationId']}"
        operations[verb] = operation | {"tags": [service], "security": _security(route)}
    return operations


def _security(route: Route) -> list[dict[str, list[str]]]:
    if route.access is Access.PUBLIC:
        return []
    if route.access is Access.SESSION:
        return [{"accessToken": []}]
    return [{"bearer": []}, {"apiKey": []}]
