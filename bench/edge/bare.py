"""The bare relay: uvicorn and aiohttp, raw ASGI, no checks. `python -m bench.edge.bare HOST:PORT SERVICE_URL`."""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
import uvicorn

HOP = (b"host", b"connection", b"transfer-encoding", b"content-length")


class Bare:
    """An ASGI application."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = [(k.decode(), v.decode()) for k, v in scope["headers"] if k not in HOP]
        async with self._session.request(
            scope["method"], self._service + scope["path"], headers=headers, data=body
        ) as response:
            kept = [(k.lower(), v) for k, v in response.raw_headers if k.lower() != b"transfer-encoding"]
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            async for chunk in response.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    uvicorn.run(
        Bare(sys.argv[2]),
        host=host,
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="error",
    )
