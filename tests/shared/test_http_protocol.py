"""What comes before a request is bounded in size and time, and a client that leaves is noticed by whom it concerns."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from shared import http_protocol
from shared.http_protocol import HEAD_BYTES_MAX, GuardedHttpProtocol

PIECE = 16_384
DEADLINE_S = 60
HEAD = b"POST / HTTP/1.1\r\nhost: test\r\n"


@dataclass
class Application:
    """Counts what it was asked; /wait answers only when its client has gone."""

    asked: int = 0
    left: list[str] = field(default_factory=list)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        if scope["path"].startswith("/wait"):
            self.waiting.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.append(scope["path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


@pytest.fixture
async def application() -> Application:
    return Application()


@pytest.fixture
async def port(application: Application) -> AsyncIterator[int]:
    config = uvicorn.Config(application, http=GuardedHttpProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: GuardedHttpProtocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    yield server.sockets[0].getsockname()[1]
    server.close()
    for connection in list(state.connections):
        connection.transport.abort()
    await asyncio.gather(*state.tasks, return_exceptions=True)


async def answer_to(port: int, *pieces: bytes) -> bytes:
    """Send the pieces until the server closes or all are sent; everything it said until it closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    except ConnectionError:
        return await reader.read() if not reader.exception() else b""
    finally:
        writer.close()


async def test_an_ordinary_request_is_served(port: int, application: Application) -> None:
    body = b"x" * 300_000
    head = HEAD + b"connection: close\r\ncontent-length: 300000\r\n\r\n"
    assert (await answer_to(port, head, body)).startswith(b"HTTP/1.1 204")
    assert application.asked == 1


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([HEAD, b"x: ", *[b"a" * PIECE] * 8], id="a header that never ends"),
        pytest.param([HEAD, *[b"a: b\r\n" * 2_000] * 12], id="headers without an end"),
        pytest.param([b"GET /", *[b"a" * PIECE] * 8], id="an address that never ends"),
        pytest.param([HEAD + b"x: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n"], id="all in one piece"),
    ],
)
async def test_a_head_that_is_too_large_is_refused_before_anything_sees_it(
    port: int, application: Application, pieces: list[bytes]
) -> None:
    said = await answer_to(port, *pieces)
    assert said == b"" or said.startswith(b"HTTP/1.1 431 ")
    assert said.count(b"HTTP/1.1") <= 1
    assert application.asked == 0


async def test_a_trailer_that_never_ends_is_cut(port: int) -> None:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx: "
    said = await answer_to(port, head, *[b"a" * PIECE] * 8)
    assert said == b"" or said.startswith(b"HTTP/1.1 431 ")


async def test_small_heads_may_follow_each_other_for_ever(port: int, application: Application) -> None:
    request = HEAD + b"content-length: 0\r\nx: " + b"a" * 8_192 + b"\r\n\r\n"
    last = HEAD + b"content-length: 0\r\nconnection: close\r\n\r\n"
    said = await answer_to(port, *[request] * 20, last)
    assert said.count(b"HTTP/1.1 204") == 21
    assert application.asked == 21


@pytest.mark.parametrize("sent", [b"", b"P", HEAD])
async def test_a_head_that_does_not_come_closes_the_connection(
    port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    assert await answer_to(port, sent) == b""


async def test_the_time_for_a_head_begins_anew_with_the_next_request(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    said = await answer_to(port, HEAD + b"content-length: 0\r\n\r\n", HEAD)
    assert said.count(b"HTTP/1.1 204") == 1


async def test_of_pipelined_requests_the_one_being_answered_learns_that_its_client_left(
    port: int, application: Application
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    request = b"GET /wait/%d HTTP/1.1\r\nhost: test\r\n\r\n"
    writer.write(request % 1 + request % 2 + request % 3)
    async with asyncio.timeout(DEADLINE_S):
        await application.waiting.wait()
        writer.close()
        while not application.left:
            await asyncio.sleep(0.01)
    assert application.left == ["/wait/1"]
    assert application.asked == 1
