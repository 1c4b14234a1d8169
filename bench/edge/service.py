"""The service behind every contender: a small program that costs as little as it can.

    python -m bench.edge.service HOST:PORT

POST of a small body: 1 KB of JSON. Of one that asks to stream: as many server-sent events, so many milliseconds
apart, as its message says ("400,10"). GET /auth: 204, for nginx's auth_request; any other GET: as the POST.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import httptools
import uvloop

CHOICE = {"index": 0, "message": {"role": "assistant", "content": "x" * 800}, "finish_reason": "stop"}
REPLY = json.dumps(
    {"id": "chatcmpl-1", "object": "chat.completion", "created": 1763700000, "model": "bench", "choices": [CHOICE]}
).encode()
SMALL = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(REPLY), REPLY)
KEY = {
    "kty": "EC",
    "crv": "P-256",
    "alg": "ES256",
    "use": "sig",
    "kid": "bench",
    "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
}  # RFC 7517's example: auth's key set, so that nobody asks for it again and again
KEY_SET = json.dumps({"keys": [KEY]}).encode()
KEYS = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(KEY_SET), KEY_SET)
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
OTHERS = {b"/auth": EMPTY, b"/.well-known/jwks.json": KEYS}
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1763700000,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"data: [DONE]\n\n"


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self._url = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if b'"stream": true' in self._body or b'"stream":true' in self._body:
            chunks, gap_ms = json.loads(self._body)["messages"][0]["content"].split(",")
            self._transport.write(STREAM)
            self._next_chunk(int(chunks), int(gap_ms) / 1000)
        else:
            self._transport.write(OTHERS.get(self._url, SMALL))

    def _next_chunk(self, left: int, gap_s: float) -> None:
        if self._transport.is_closing():
            return
        if not left:
            self._transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(LAST), LAST))
            return
        self._transport.write(CHUNK)
        asyncio.get_running_loop().call_later(gap_s, self._next_chunk, left - 1, gap_s)


async def serve(listen: str) -> None:
    """Until killed."""
    host, _, port = listen.rpartition(":")
    server = await asyncio.get_running_loop().create_server(Connection, host, int(port), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
