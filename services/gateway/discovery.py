"""Where the services are: from the environment, a file, or DNS; looked at again while the gateway runs.

    TOLLGATE_CHAT_URL=http://10.0.0.1:8102,http://10.0.0.2:8102     these replicas
    TOLLGATE_CHAT_URL=dns+http://chat.internal:8102                 one replica for each address of the name
    TOLLGATE_GATEWAY_SERVICES_FILE=/etc/tollgate/services.json      {"chat": ["http://…", …], …}; wins over the above

What cannot be read, resolved or used leaves the table as it was, and is logged once until it changes.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from services.gateway.replicas import Upstream
from shared.telemetry import get_logger

log = get_logger(__name__)

DNS_SCHEME = "dns+"
FILE_BYTES_MAX = 1024 * 1024
REPLICAS_MAX = 256
RESOLVE_TIMEOUT_S = 5.0


class Discovery:
    """Keeps the replicas of `upstreams` as `urls` (service → setting) and the file say."""

    def __init__(self, upstreams: Mapping[str, Upstream], urls: Mapping[str, str], file: Path | None) -> None:
        self._upstreams = upstreams
        self._urls = urls
        self._file = file
        self._problems: dict[str, str] = {}

    async def run(self, interval_s: float) -> None:
        """Look and probe for ever."""
        while True:
            await self.look()
            await asyncio.gather(*[upstream.probe() for upstream in self._upstreams.values()])
            await asyncio.sleep(interval_s)

    async def look(self) -> None:
        """Bring the table up to date."""
        listed = self._read_file()
        for name, upstream in self._upstreams.items():
            try:
                urls = listed.get(name) or self._urls[name].split(",")
                upstream.update(await _resolved(urls))
            except (OSError, TimeoutError, ValueError) as e:
                self._complain(name, f"{type(e).__name__}: {e}")
            else:
                self._problems.pop(name, None)

    def _read_file(self) -> Mapping[str, list[str]]:
        if self._file is None:
            return {}
        try:
            with self._file.open("rb") as file:
                table = json.loads(file.read(FILE_BYTES_MAX))
            if not isinstance(table, dict) or not all(
                name in self._upstreams and isinstance(urls, list) and urls and all(isinstance(u, str) for u in urls)
                for name, urls in table.items()
            ):
                raise ValueError("it wants {service: [url, …]}")
        except (OSError, ValueError) as e:
            self._complain("file", f"{type(e).__name__}: {e}")
            return {name: [r.url for r in upstream.replicas] for name, upstream in self._upstreams.items()}
        self._problems.pop("file", None)
        return table

    def _complain(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            self._problems[name] = problem
            log.warning("service_table_not_updated", service=name, detail=problem)


def static(setting: str) -> list[str]:
    """The URLs of a setting before any name is resolved: the name stands for its addresses."""
    return [url.strip().removeprefix(DNS_SCHEME) for url in setting.split(",")]


async def _resolved(urls: list[str]) -> list[str]:
    """Each URL, those of a DNS name as one for each of its addresses. Raises OSError, TimeoutError, ValueError."""
    found: list[str] = []
    for url in (u.strip() for u in urls):
        if not url.startswith(DNS_SCHEME):
            found.append(url)
            continue
        parts = urlsplit(url.removeprefix(DNS_SCHEME))
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"{url!r} is not dns+http://name:port")
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            addresses = await asyncio.get_running_loop().getaddrinfo(
                parts.hostname, parts.port, type=socket.SOCK_STREAM
            )
        hosts = sorted({str(entry[4][0]) for entry in addresses})
        found += [f"{parts.scheme}://{f'[{h}]' if ':' in h else h}:{parts.port}" for h in hosts]
    return found[:REPLICAS_MAX]
