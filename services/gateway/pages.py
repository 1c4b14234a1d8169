"""What the gateway answers itself: health, the merged OpenAPI document, and Swagger UI from the installed wheel.

/docs needs nothing from outside: the assets of Swagger UI come with the package `fastapi-offline`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

from services.gateway.caches import BoundedCache
from services.gateway.exchange import PageExchange
from services.gateway.heads import RawHeaders
from services.gateway.openapi import OpenApi
from shared.clock import Clock
from shared.errors import MethodNotAllowed, NotFound
from shared.web import Readiness

CRITICAL_CHECKS = ("redis", "postgres")  # one of the two is enough to admit requests
ASSETS = {
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
    "favicon.png": b"image/png",
}
INIT_SCRIPT = b"""window.ui = SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, persistAuthorization: false, validatorUrl: null
});
"""
PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tollgate API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css"><link rel="icon" href="/docs/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>
</body>
</html>
"""
PAGE_POLICY = (
    b"content-security-policy",
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; frame-ancestors 'none'",
)
JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")

Handler = Callable[[PageExchange], Awaitable[None]]


class Pages:
    """Answers a path that is the gateway's own, GET and HEAD only.

    Anyone may ask, so that the checks behind /readyz run once at a time and their report is kept for `readiness_ttl_s`.
    """

    UNLOGGED: ClassVar[tuple[str, ...]] = ("/healthz", "/readyz")

    def __init__(self, *, readiness: Readiness, openapi: OpenApi, clock: Clock, readiness_ttl_s: float = 1) -> None:
        self._readiness = readiness
        self._reports: BoundedCache[bool, tuple[bool, dict[str, str]]] = BoundedCache(
            clock, entries_max=1, ttl_s=readiness_ttl_s
        )
        self._reporting = asyncio.Lock()
        self._openapi = openapi
        self._assets = _load_assets()
        self._handlers: dict[str, Handler] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/openapi.json": self._document,
            "/docs": self._docs,
        }

    async def answer(self, exchange: PageExchange) -> bool:
        """Whether the path was ours, and is answered. Raises NotFound, MethodNotAllowed."""
        handler = self._handlers.get(exchange.path)
        if handler is None:
            if not exchange.path.startswith("/docs/"):
                return False
            handler = self._asset
        exchange.route = "/docs/" if handler == self._asset else exchange.path
        if exchange.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(headers={"allow": "GET, HEAD"})
        await handler(exchange)
        return True

    async def _healthz(self, exchange: PageExchange) -> None:
        await exchange.respond(200, [JSON, NO_STORE], b'{"status":"ok"}')

    async def _readyz(self, exchange: PageExchange) -> None:
        status, body = await self.readiness_report()
        await exchange.respond(status, [JSON, NO_STORE], json.dumps(body).encode())

    async def readiness_report(self) -> tuple[int, dict[str, object]]:
        """200 `ok`; 200 `degraded` while requests can still be admitted; 503 `unavailable`."""
        all_ok, checks = await self._recent_report()
        if all_ok:
            return 200, {"status": "ok", "checks": checks}
        serving = not self._readiness.draining and any(checks.get(name) == "ok" for name in CRITICAL_CHECKS)
        return (200 if serving else 503), {"status": "degraded" if serving else "unavailable", "checks": checks}

    async def _recent_report(self) -> tuple[bool, dict[str, str]]:
        async with self._reporting:
            draining = self._readiness.draining  # is told at once
            if (report := self._reports.get(draining)) is None:
                report = await self._readiness.report()
                self._reports.put(draining, report)
            return report

    async def _document(self, exchange: PageExchange) -> None:
        await exchange.respond(200, [JSON, NO_STORE], await self._openapi.document())

    async def _docs(self, exchange: PageExchange) -> None:
        headers: RawHeaders = [(b"content-type", b"text/html; charset=utf-8"), NO_STORE]
        await exchange.respond(200, headers, PAGE, PAGE_POLICY)

    async def _asset(self, exchange: PageExchange) -> None:
        asset = self._assets.get(exchange.path.removeprefix("/docs/"))
        if asset is None:
            raise NotFound()
        kind, data = asset
        headers = [(b"content-type", kind), (b"cache-control", b"public, max-age=86400")]
        await exchange.respond(200, headers, data, PAGE_POLICY)


def _load_assets() -> dict[str, tuple[bytes, bytes]]:
    """Swagger UI's files from the wheel, without importing it: its module patches nothing that we need."""
    package = importlib.util.find_spec("fastapi_offline")
    assert package is not None
    assert package.origin is not None
    static = Path(package.origin).parent / "static"
    assets = {name: (kind, (static / name).read_bytes()) for name, kind in ASSETS.items()}
    assets["start.js"] = (ASSETS["swagger-ui-bundle.js"], INIT_SCRIPT)
    return assets
