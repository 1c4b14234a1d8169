"""Where a request goes: its path in normal form, and the route that owns it. Kept for the addresses seen last."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from urllib.parse import unquote

import httptools

from services.gateway.errors import UriTooLong
from services.gateway.upstreams import Route, RouteTable
from shared.errors import InvalidRequest, TollgateError

URI_BYTES_MAX = 8 * 1024
REMEMBERED_BYTES_MAX = 256
REMEMBERED_MAX = 4_096
FORBIDDEN_SEGMENT = re.compile(r"/\.\.?(/|\Z)")

invalid_path = partial(InvalidRequest, "The address is not in its normal form.", code="invalid_path")


@dataclass(frozen=True, slots=True)
class Target:
    """`path` is decoded; `raw` is what goes to the service; `error` makes what no service should ever see fail."""

    path: str
    raw: bytes
    route: Route | None
    error: Callable[[], TollgateError] | None = None


class Targets:
    """Finds the target of a request line's address."""

    def __init__(self, routes: RouteTable) -> None:
        self._routes = routes
        self._remembered = lru_cache(maxsize=REMEMBERED_MAX)(self._read)

    def find(self, url: bytes) -> Target:
        return self._remembered(url) if len(url) <= REMEMBERED_BYTES_MAX else self._read(url)

    def _read(self, url: bytes) -> Target:
        if url.startswith(b"/"):
            raw_path, mark, query = url.partition(b"?")
        else:  # the absolute form, as to a proxy; `*` and host:port name no path of ours
            try:
                parsed = httptools.parse_url(url)
            except httptools.HttpParserInvalidURLError:
                return Target("", url, None, invalid_path)
            raw_path, query = parsed.path or b"", parsed.query or b""
            mark = b"?" if query else b""
        path = unquote(raw_path.decode("latin-1"))
        error = normal_form_error(path, url)
        return Target(path, raw_path + mark + query, self._routes.find(path), error)


def normal_form_error(path: str, url: bytes) -> Callable[[], TollgateError] | None:
    """What is wrong with an address, or None."""
    if len(url) > URI_BYTES_MAX:
        return UriTooLong
    if b"#" in url or not path.isprintable() or "\\" in path or ("/." in path and FORBIDDEN_SEGMENT.search(path)):
        return invalid_path
    return None
