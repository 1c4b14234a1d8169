"""Bytes in, bytes out, as they come; whoever leaves or dies is noticed at once and never taken for a proper end."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil
import pytest

from deploy.local.ports import pick_port
from tests.conftest import Components
from tests.gateway.harness import Backend, Directory, Gateway, Key, answer, gateway, settings
from tests.gateway.outages import DEADLINE_S, eventually

CHAT = "/v1/chat/completions"
SSE = [(b"content-type", b"text/event-stream")]


async def begin(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": SSE})


async def chunk(send: Any, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def test_chunks_arrive_one_by_one(gateway: Gateway, backend: Backend, directory: Directory) -> None:
    proceed = asyncio.Semaphore(0)

    async def stream(_scope: Any, _receive: Any, send: Any) -> None:
        await begin(send)
        for i in range(5):
            await chunk(send, b"data: %d\n\n" % i)
            await proceed.acquire()  # nothing more until the client has this one
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    backend.handlers[CHAT] = stream
    key = await directory.create_key()
    got = []
    async with gateway.http.stream("POST", CHAT, headers=key.headers) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["x-ratelimit-limit-requests"]
        async for piece in response.aiter_raw():
            got.append(piece)
            proceed.release()
    assert got == [b"data: %d\n\n" % i for i in range(5)] + [b"data: [DONE]\n\n"]


class Witness:
    """A handler that says what it saw: that it was entered, and that its client left."""

    def __init__(self, *, first_chunk: bool) -> None:
        self.entered, self.left = asyncio.Event(), asyncio.Event()
        self._first_chunk = first_chunk

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if self._first_chunk:
            await begin(send)
            await chunk(send, b"data: 1\n\n")
        self.entered.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()


@pytest.mark.parametrize("first_chunk", [False, True], ids=["before the first byte", "in mid-stream"])
async def test_a_client_that_leaves_stops_the_service(
    gateway: Gateway, backend: Backend, directory: Directory, first_chunk: bool
) -> None:
    key = await directory.create_key()
    witness = backend.handlers[CHAT] = Witness(first_chunk=first_chunk)
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        task = asyncio.create_task(_read(client, key))
        await asyncio.wait_for(witness.entered.wait(), DEADLINE_S)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await asyncio.wait_for(witness.left.wait(), DEADLINE_S)
    backend.handlers.clear()
    assert (await gateway.http.post(CHAT, headers=key.headers)).status_code == 200


async def _read(client: httpx.AsyncClient, key: Key, into: bytearray | None = None) -> None:
    async with client.stream("POST", CHAT, headers=key.headers, timeout=DEADLINE_S) as response:
        async for piece in response.aiter_raw():
            if into is not None:
                into += piece


@pytest.mark.parametrize("framing", ["chunked", "content-length"])
async def test_a_service_that_dies_in_mid_response_breaks_the_stream(
    components: Components, database_url: str, directory: Directory, framing: str
) -> None:
    head = {
        "chunked": b"transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n",
        "content-length": b"content-length: 1000000\r\n\r\ndata: 1\n\n",
    }[framing]
    key = await directory.create_key()
    async with (
        raw_service(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + head, hang_up=True) as url,
        gateway(settings(components.redis_url, database_url, url)) as running,
    ):
        got = bytearray()
        with pytest.raises(httpx.RemoteProtocolError):
            await _read(running.http, key, got)
        assert got == b"data: 1\n\n"


@contextlib.asynccontextmanager
async def raw_service(reply: bytes, *, hang_up: bool) -> AsyncIterator[str]:
    """A service that reads a request's head and writes these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
            if hang_up:
                writer.close()
            else:
                await reader.read()
        writer.close()

    port = pick_port()
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"this is not HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfive!",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
    ],
    ids=["nothing", "garbage", "too short", "bad length"],
)
async def test_a_service_that_answers_nothing_usable_is_a_502(
    components: Components, database_url: str, directory: Directory, reply: bytes
) -> None:
    key = await directory.create_key()
    async with (
        raw_service(reply, hang_up=True) as url,
        gateway(settings(components.redis_url, database_url, url)) as running,
    ):
        response = await running.http.post(CHAT, headers=key.headers)
        assert (response.status_code, response.json()["error"]["code"]) == (502, "bad_gateway")
        assert "127.0.0.1" not in response.text
        assert response.headers["x-ratelimit-limit-requests"]
        assert await running.metric("tollgate_gateway_upstream_errors_total", upstream="chat", code="broken") == 1


async def test_a_slow_service_is_a_504(components: Components, database_url: str, directory: Directory) -> None:
    key = await directory.create_key()
    async with (
        raw_service(b"", hang_up=False) as url,
        gateway(settings(components.redis_url, database_url, url, gateway_first_byte_timeout_s=0.3)) as running,
    ):
        response = await running.http.post(CHAT, headers=key.headers)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


async def test_a_stream_that_stalls_breaks(components: Components, database_url: str, directory: Directory) -> None:
    key = await directory.create_key()
    reply = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
    async with (
        raw_service(reply, hang_up=False) as url,
        gateway(settings(components.redis_url, database_url, url, gateway_idle_timeout_s=0.3)) as running,
    ):

        async def breaks() -> bool:
            try:
                late = await running.http.post(CHAT, headers=key.headers)
            except httpx.RemoteProtocolError:
                return True
            assert late.status_code == 504  # a busy machine: not even admitted in time
            return False

        await eventually(breaks)


async def test_a_service_that_is_down_is_a_503_and_the_next_replica_is_tried(
    components: Components, database_url: str, directory: Directory, backend: Backend
) -> None:
    key = await directory.create_key()
    nowhere = f"http://127.0.0.1:{pick_port()}"
    async with gateway(settings(components.redis_url, database_url, nowhere)) as running:
        response = await running.http.post(CHAT, headers=key.headers)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "service_unavailable")
        assert response.headers["retry-after"] == "1"
    configured = settings(components.redis_url, database_url, f"{nowhere},{backend.url}")
    async with gateway(configured) as running:
        for _ in range(5):
            assert (await running.http.post(CHAT, json={}, headers=key.headers)).status_code == 200


async def test_a_request_that_was_sent_is_never_sent_again(
    components: Components, database_url: str, directory: Directory
) -> None:
    key, seen = await directory.create_key(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST")
        writer.close()

    ports = [pick_port(), pick_port()]
    servers = [await asyncio.start_server(serve, "127.0.0.1", port) for port in ports]
    urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    async with gateway(settings(components.redis_url, database_url, urls)) as running:
        for _ in range(4):
            assert (await running.http.post(CHAT, headers=key.headers)).status_code == 502
    for server in servers:
        server.close()
    assert seen == 4


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/v1/keys"), ("DELETE", "/api/v1/keys/1")])
async def test_a_kept_connection_that_breaks_is_no_reason_to_send_again(
    components: Components, database_url: str, directory: Directory, method: str, path: str
) -> None:
    key, seen = await directory.create_key(scopes=("*",)), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        with contextlib.suppress(asyncio.IncompleteReadError):
            while (await reader.readuntil(b"\r\n\r\n")).startswith(f"{method} {path}".encode()):
                seen += 1
                if seen == 2:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    port = pick_port()
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with gateway(settings(components.redis_url, database_url, f"http://127.0.0.1:{port}")) as running:
        responses = [await running.http.request(method, path, headers=key.headers) for _ in range(2)]
    server.close()
    assert [response.status_code for response in responses] == [200, 502]
    assert seen == 2


async def test_what_any_connection_header_names_stays_behind(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    async def hop(_scope: Any, _receive: Any, send: Any) -> None:
        named = [(b"connection", b"x-one"), (b"connection", b"x-two, X-Three")]
        await answer(
            send, 200, b"", [*named, (b"x-one", b"1"), (b"x-two", b"2"), (b"x-three", b"3"), (b"x-four", b"4")]
        )

    key = await directory.create_key()
    headers = [*key.headers.items(), ("connection", "x-one"), ("connection", "X-Two"), ("x-two", "2"), ("x-four", "4")]
    assert (await gateway.http.post(CHAT, headers=[*headers, ("x-one", "1")])).status_code == 200
    assert [backend.last.header(name) for name in ("x-one", "x-two", "x-four")] == [None, None, "4"]
    backend.handlers[CHAT] = hop
    response = await gateway.http.post(CHAT, headers=key.headers)
    assert [response.headers.get(f"x-{name}") for name in ("one", "two", "three", "four")] == [None, None, None, "4"]


async def test_bodies_have_a_limit_whatever_they_say(
    components: Components, database_url: str, directory: Directory, backend: Backend
) -> None:
    key = await directory.create_key()
    configured = settings(components.redis_url, database_url, backend.url, gateway_body_bytes_max=100_000)

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 1_000

    async with gateway(configured) as running:
        fits = await running.http.post(CHAT, content=b"x" * 100_000, headers=key.headers)
        assert fits.json()["bytes"] == 100_000
        fits = await running.http.post(CHAT, content=pieces(100), headers=key.headers)
        assert fits.json()["bytes"] == 100_000
        seen = len(backend.seen)
        too_long = await running.http.post(CHAT, content=b"x" * 100_001, headers=key.headers)
        assert (too_long.status_code, too_long.json()["error"]["code"]) == (413, "payload_too_large")
        too_long = await running.http.post(CHAT, content=pieces(101), headers=key.headers)
        assert too_long.status_code == 413
        assert len(backend.seen) == seen
        used = await running.http.post(CHAT, headers=key.headers)
        assert used.headers["x-ratelimit-remaining-requests"] == str(60 - 4)  # a stated length was refused before


async def test_a_body_that_stalls_is_a_408(
    components: Components, database_url: str, directory: Directory, backend: Backend
) -> None:
    key = await directory.create_key()
    configured = settings(components.redis_url, database_url, backend.url, gateway_idle_timeout_s=0.3)
    async with gateway(configured) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\nauthorization: {key.secret}\r\n\r\nhalf"
        writer.write(head.encode())
        assert (await asyncio.wait_for(reader.readline(), DEADLINE_S)).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_a_slow_client_holds_the_service_back_not_our_memory(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    sent, total = 0, 64 * 1024 * 1024

    async def pour(_scope: Any, _receive: Any, send: Any) -> None:
        nonlocal sent
        await begin(send)
        while sent < total:
            await chunk(send, b"x" * 65_536)
            sent += 65_536
        await send({"type": "http.response.body", "body": b""})

    backend.handlers[CHAT] = pour
    key = await directory.create_key()
    port = int(gateway.url.rpartition(":")[2])
    before = psutil.Process().memory_info().rss
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(
        client, f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: {key.secret}\r\ncontent-length: 0\r\n\r\n".encode()
    )
    last = -1
    while sent != last or not sent:  # until nothing moves any more
        last = sent
        await asyncio.sleep(0.3)
    assert sent < total / 4
    assert psutil.Process().memory_info().rss - before < 24 * 1024 * 1024
    received = 0
    while received < total:
        received += len(await loop.sock_recv(client, 1 << 20))
    client.close()
    assert sent == total


async def test_many_clients_that_leave_leave_nothing_behind(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    async def slow(_scope: Any, receive: Any, send: Any) -> None:
        await begin(send)
        while (await receive())["type"] != "http.disconnect":
            await chunk(send, b"data: 1\n\n")

    backend.handlers[CHAT] = slow
    key = await directory.create_key(limits={"minute": 10_000, "hour": 10_000, "day": 10_000, "concurrency": 50})
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        for _ in range(6):
            tasks = [asyncio.create_task(_read(client, key)) for _ in range(40)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

            async def is_idle() -> bool:
                return await gateway.metric("tollgate_http_requests_in_flight", service="gateway") == 0

            await eventually(is_idle)
    backend.handlers.clear()
    assert (await gateway.http.post(CHAT, headers=key.headers)).status_code == 200


async def test_empty_and_error_responses_pass_unchanged(
    gateway: Gateway, backend: Backend, directory: Directory
) -> None:
    async def no_content(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def short_of_credits(_scope: Any, _receive: Any, send: Any) -> None:
        await answer(send, 402, b'{"error":{}}')

    key = await directory.create_key()
    backend.handlers[CHAT] = no_content
    response = await gateway.http.post(CHAT, headers=key.headers)
    assert (response.status_code, response.content) == (204, b"")
    backend.handlers[CHAT] = short_of_credits
    response = await gateway.http.post(CHAT, headers=key.headers)
    assert (response.status_code, response.content) == (402, b'{"error":{}}')
