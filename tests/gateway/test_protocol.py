"""Framing on both wires, byte by byte: what comes in pieces is what came whole, and nothing is taken for another."""

import asyncio
import itertools
import random
import zlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.gateway.protocol import PIPELINED_MAX
from services.gateway.relay import Cors, Timeouts
from tests.gateway.wires import Wired

POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: protocol-1\r\n"
    b'content-length: 11\r\n\r\n{"a": true}'
)
CHUNKED = (
    b"POST /v1/chat/completions?q=%20 HTTP/1.1\r\nHost: x\r\nx-request-id: protocol-2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nx-trailer: 1\r\n\r\n"
)
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: text/x\r\ncontent-length: 5\r\nserver: s\r\n\r\nhello"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + PLAIN
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\nx-trailer: 1\r\n\r\n"
)
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest_asyncio.fixture
async def wired() -> AsyncIterator[Wired]:
    wired = Wired()
    yield wired
    wired.close()


def pieces(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


def body_of(message: bytes) -> tuple[bytes, bytes]:
    """Head, and body with its chunks joined."""
    head, _, rest = message.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return head, rest
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            assert not rest
    return head, body


async def send(wired: Wired, parts: list[bytes]) -> bytes:
    """What the service gets for a request that comes in these pieces."""
    for part in parts:
        wired.front.data_received(part)
        if random.random() < 0.3:
            await wired.settle()
    await wired.settle()
    return wired.service.take()


@pytest.mark.parametrize("request_bytes", [POST, CHUNKED], ids=["length", "chunked"])
async def test_a_request_split_at_any_byte_is_the_same_request(wired: Wired, request_bytes: bytes) -> None:
    random.seed(6)
    splits = [[i] for i in range(len(request_bytes))] + [list(range(len(request_bytes)))]
    seen = set()
    for split in splits:
        head, body = body_of(await send(wired, pieces(request_bytes, split)))
        framing = (b"transfer-encoding: chunked", b"content-length: 11")
        assert sum(line.lower() in framing for line in head.split(b"\r\n")) == 1
        seen.add((head.split(b"\r\n")[0], body))
        assert b"x-trailer" not in head
        wired.back.data_received(PLAIN)
        assert body_of(wired.client.take())[1] == b"hello"
    assert len(seen) == 1


@pytest.mark.parametrize("response", [PLAIN, INTERIM, STREAM, NO_CONTENT], ids=["length", "103", "chunked", "204"])
async def test_a_response_split_at_any_byte_is_the_same_response(wired: Wired, response: bytes) -> None:
    seen = set()
    for split in [[i] for i in range(len(response))] + [list(range(len(response)))]:
        await send(wired, [POST])
        for part in pieces(response, split):
            wired.back.data_received(part)
        head, body = body_of(wired.client.take())
        assert b"x-trailer" not in head
        assert b"server" not in head
        assert b"link" not in head
        seen.add((head, body))
    assert len(seen) == 1
    assert not wired.client.is_closed
    assert not wired.service.is_closed  # one connection served them all


async def test_garbage_from_a_client_never_reaches_a_service(wired: Wired) -> None:
    """Random damage to a request: the service sees a whole, well-framed request or nothing."""
    chance = random.Random(20261121)
    for _ in range(1_500):
        damaged = bytearray(chance.choice((POST, CHUNKED)))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            what = chance.randrange(3)
            if what == 0:
                damaged[place] = chance.randrange(256)
            elif what == 1:
                del damaged[place : place + chance.randint(1, 5)]
            else:
                damaged[place:place] = chance.choice((b"\r\n", b"\n", b" ", b"\x00", b"0", b":", b"\r", b"chunked"))
        single = Wired()
        single.front.data_received(bytes(damaged))
        await single.settle()
        got = single.service.take()
        if got:
            head, _, _ = got.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0].endswith(b" HTTP/1.1")
            assert lines[0].count(b" ") == 2
            assert all(b":" in line and b"\n" not in line and b"\r" not in line for line in lines[1:])
            assert b"\x00" not in head
        single.close()


async def test_garbage_from_a_service_is_never_a_whole_answer(wired: Wired) -> None:
    chance = random.Random(6)
    whole = body_of(PLAIN)[1]
    for _ in range(1_500):
        damaged = bytearray(chance.choice((PLAIN, STREAM)))
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(damaged))
            damaged[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        single = Wired()
        await send(single, [POST])
        single.back.data_received(bytes(damaged))
        single.back.connection_lost(ConnectionResetError())
        got = single.client.take()
        assert got.startswith(b"HTTP/1.1 ")
        if got.startswith(b"HTTP/1.1 200") and not single.client.is_closed:
            head, body = body_of(got)
            assert b"content-length: %d" % len(body) in head or b"chunked" in head
            assert len(body) <= len(whole) + 40
        single.close()


async def test_a_second_answer_is_nobodys(wired: Wired) -> None:
    await send(wired, [POST])
    wired.back.data_received(PLAIN + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
    assert wired.service.is_closed
    assert b"evil" not in wired.client.take()
    other = wired.connect()
    other.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")  # unasked
    assert wired.service.is_closed
    wired.back = wired.connect()
    await send(wired, [POST])
    wired.back.data_received(PLAIN)
    assert wired.client.take().endswith(b"hello")


async def test_pipelined_requests_are_answered_in_order_and_not_without_end(wired: Wired) -> None:
    count = PIPELINED_MAX + 5
    wired.front.data_received(POST * count)
    answered = 0
    for _ in range(count):
        await wired.settle()
        got = wired.service.take()
        if not got:
            break
        assert got.count(b"POST ") == 1  # one at a time
        answered += 1
        wired.back.data_received(PLAIN.replace(b"hello", b"no%3d" % answered))
    bodies = [part[:5] for part in wired.client.take().split(b"\r\n\r\n")[1:]]
    assert bodies == [b"no%3d" % (i + 1) for i in range(answered)]
    assert answered == PIPELINED_MAX + 1
    assert wired.client.is_closed


async def test_pressure_goes_through_both_ways(wired: Wired) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90000\r\n\r\n"
    wired.front.data_received(head + b"x" * 70_000)
    assert wired.client.is_held  # there is no connection yet
    await wired.settle()
    assert not wired.client.is_held
    wired.back.pause_writing()
    assert wired.client.is_held
    wired.back.resume_writing()
    assert not wired.client.is_held
    wired.front.data_received(b"x" * 20_000)
    wired.back.data_received(STREAM[:-20])
    wired.front.pause_writing()
    assert wired.service.is_held
    wired.front.resume_writing()
    assert not wired.service.is_held
    wired.front.pause_writing()
    wired.back.data_received(STREAM[-20:])
    assert not wired.service.is_held  # it is free for another request


async def test_a_client_that_leaves_is_noticed_at_once(wired: Wired) -> None:
    await send(wired, [POST])
    wired.front.connection_lost(None)
    assert wired.service.is_closed  # in the same turn of the loop


@pytest.mark.parametrize(
    ("timeouts", "failures"),
    [(Timeouts(first_byte_s=0, idle_s=60, total_s=60), 1), (Timeouts(first_byte_s=60, idle_s=60, total_s=0), 0)],
    ids=["no first byte", "too long in all"],
)
async def test_only_silence_speaks_against_a_replica(timeouts: Timeouts, failures: int) -> None:
    wired = Wired(timeouts=timeouts)
    await send(wired, [POST])
    wired.relay._sweep()
    assert wired.client.take().startswith(b"HTTP/1.1 504")
    assert wired.service.is_closed
    assert wired.upstream.replicas[0]._failures == failures
    wired.close()


async def test_an_answer_that_comes_before_the_request_has_ended_is_the_last(wired: Wired) -> None:
    await send(wired, [POST[:-5]])
    wired.back.data_received(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
    got = wired.client.take()
    assert got.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in got
    assert wired.service.is_closed
    wired.front.data_received(POST[-5:] + POST)  # read, so that the answer is not lost, and dropped
    await wired.settle()
    assert not wired.client.take()


@pytest.mark.parametrize(
    "headers",
    [
        b"",
        b"content-encoding: br\r\n",
        b"cache-control: no-transform\r\n",
        b'etag: "1"\r\n',
        b"content-type: image/png\r\n",
    ],
    ids=["plain", "encoded", "no-transform", "etag", "image"],
)
async def test_large_answers_are_compressed_where_nothing_forbids_it(wired: Wired, headers: bytes) -> None:
    body = b'{"text": "%b"}' % (b"toll gate " * 20_000)
    kind = b"" if b"content-type" in headers else b"content-type: application/json\r\n"
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b%b\r\n%b" % (len(body), kind, headers, body)
    for accepts in (b"", b"accept-encoding: gzip, br\r\n"):
        await send(wired, [POST.replace(b"host: x\r\n", b"host: x\r\n" + accepts)])
        for part in pieces(answer, [60_000, 120_000]):
            wired.back.data_received(part)
        head, got = body_of(wired.client.take())
        if accepts and not headers:
            assert b"content-encoding: gzip" in head
            assert len(got) < len(body) / 10
            got = zlib.decompress(got, 31)
        assert got == body


@pytest.mark.parametrize(("origin", "is_allowed"), [(b"https://a.example", True), (b"https://evil.example", False)])
async def test_other_origins_are_answered_as_configured(origin: bytes, is_allowed: bool) -> None:
    wired = Wired(cors=Cors("https://a.example, https://b.example"))
    asked = (
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: %b\r\naccess-control-request-method: POST\r\n\r\n"
    )
    wired.front.data_received(asked % origin)
    preflight = wired.client.take()
    assert preflight.startswith(b"HTTP/1.1 204" if is_allowed else b"HTTP/1.1 405")
    await send(wired, [POST.replace(b"host: x\r\n", b"host: x\r\norigin: %b\r\n" % origin)])
    wired.back.data_received(PLAIN.replace(b"server: s\r\n", b"access-control-allow-origin: *\r\n"))
    for got in (preflight, wired.client.take()):
        assert (b"access-control-allow-origin: https://a.example" in got) == is_allowed
        assert b"access-control-allow-origin: *" not in got
    wired.close()


async def test_the_transport_is_pinned_where_the_public_address_is_tls() -> None:
    wired = Wired(is_public_tls=True)
    await send(wired, [POST])
    wired.back.data_received(PLAIN)
    assert b"strict-transport-security: max-age=" in wired.client.take()
    wired.close()


async def test_a_pipelined_body_that_is_too_large_is_no_answer_to_another_request(wired: Wired) -> None:
    await send(wired, [POST])
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for part in [head, *[b"2710\r\n" + b"x" * 10_000 + b"\r\n"] * 11, POST]:
        wired.front.data_received(part)
    await wired.settle()
    assert wired.client.take() == b""  # the first one's turn
    wired.back.data_received(PLAIN)
    head, body = body_of(wired.client.take())
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"hello"
    await wired.settle()
    assert wired.client.is_closed
    assert wired.service.take() == b""


@pytest.mark.parametrize("answer", [PLAIN, STREAM])
@pytest.mark.parametrize("is_begun", [True, False])
async def test_a_connection_ends_only_after_an_answer_that_says_so(answer: bytes, is_begun: bool) -> None:
    """The process stops. Where the head has left, the client may have sent the next request already."""
    wired = Wired(timeouts=Timeouts(first_byte_s=300, idle_s=60, total_s=3_600, drain_idle_s=300))
    cut = answer.index(b"\r\n\r\n") + 4
    wired.front.data_received(POST)
    await wired.settle()
    wired.back.data_received(answer[: cut if is_begun else 0])
    wired.front.shutdown()
    wired.back.data_received(answer[cut if is_begun else 0 :])
    if is_begun:
        assert b"connection: close" not in wired.client.take()
        assert not wired.client.is_closed
        wired.front.data_received(POST)
        await wired.settle()
        wired.back.data_received(answer)
    assert b"connection: close" in wired.client.take()
    assert wired.client.is_closed
    wired.close()


@pytest.mark.parametrize("is_begun", [True, False])
async def test_a_connection_without_another_request_is_closed_when_the_process_stops(is_begun: bool) -> None:
    wired = Wired(timeouts=Timeouts(first_byte_s=300, idle_s=60, total_s=3_600, drain_idle_s=0.01))
    wired.front.data_received(POST)
    await wired.settle()
    parts = [STREAM[:-5], STREAM[-5:]] if is_begun else [STREAM, b""]
    wired.back.data_received(parts[0])
    wired.front.shutdown()
    wired.back.data_received(parts[1])
    async with asyncio.timeout(60):
        while not wired.client.is_closed:
            await asyncio.sleep(0.005)
    wired.close()
