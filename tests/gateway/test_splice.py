"""Chunks that go past the parser: what the client gets is what it would get if none did."""

import itertools
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from services.gateway import pool
from services.gateway.pool import CHUNK_DIGITS_MAX, chunk_opening
from services.gateway.relay import Timeouts
from tests.gateway.wires import Wired

ASK = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: splice-1\r\ncontent-length: 0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
EVENT = b'data: {"n": 1}\n\n'


class Usage:
    """What the gateway noted of each request."""

    def __init__(self) -> None:
        self.bytes_out: list[int] = []

    def record(self, exchange: Any, *_: Any) -> None:
        self.bytes_out.append(exchange.bytes_out)


class Outcome(NamedTuple):
    """What a client makes of an answer, and what became of the two connections."""

    head: bytes
    body: bytes
    is_whole: bool
    is_client_closed: bool
    is_service_closed: bool
    bytes_out: list[int]


@pytest_asyncio.fixture
async def wired() -> AsyncIterator[Wired]:
    wired = Wired()
    yield wired
    wired.close()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_chunked(message: bytes) -> tuple[bytes, bytes, bool]:
    """Head, body, and whether its end came; the framing that we write, and no other."""
    head, _, rest = message.partition(b"\r\n\r\n")
    body, is_whole = b"", False
    while rest:
        assert not is_whole
        size, mark, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        assert mark
        assert size == b"%x" % length
        assert rest[length : length + 2] == b"\r\n"
        body, rest, is_whole = body + rest[:length], rest[length + 2 :], not length
    return head.partition(b"x-request-id")[2], body, is_whole


async def answered(parts: list[bytes]) -> Outcome:
    """What comes of an answer that arrives in these pieces, after which the service hangs up."""
    usage = Usage()
    wired = Wired(usage=usage)
    wired.front.data_received(ASK)
    await wired.settle()
    for part in parts:
        if not wired.service.is_closed:
            wired.back.data_received(part)
    is_service_closed = wired.service.is_closed
    wired.back.connection_lost(None)
    got, is_client_closed = wired.client.take(), wired.client.is_closed
    outcome = (got, b"", True) if b" 200 " not in got[:16] else read_chunked(got)
    wired.close()
    await wired.settle()
    return Outcome(*outcome, is_client_closed, is_service_closed, usage.bytes_out)


def parts_of(chance: random.Random) -> list[bytes]:
    """A stream as services may frame it, in reads of all kinds, now and then damaged."""
    pieces = [HEAD]
    for _ in range(chance.randint(1, 12)):
        data = chance.randbytes(chance.choice((1, 9, 15, 16, 17, 40, 255, 256, 5_000)))
        data = chance.choice((data, EVENT, END, chunk(b"in a chunk"), b"\r\n" + END))
        framed = chunk(data)
        size, _, rest = framed.partition(b"\r\n")
        odd = (size.upper() + b"\r\n", b"0" + size + b"\r\n", size + b";ext=1\r\n", size + b"\n", b"+" + size + b"\r\n")
        pieces.append(framed if chance.random() < 0.8 else chance.choice(odd) + rest)
    pieces.append(chance.choice((END, END, b"0\r\nx-trailer: 1\r\n\r\n", b"", END + chunk(b"after the end"))))
    reads: list[bytes] = []
    for piece in pieces:
        how = chance.random()
        if how < 0.2 and len(piece) > 1:
            at = chance.randrange(1, len(piece))
            reads += (piece[:at], piece[at:])
        elif how < 0.4 and reads:
            reads[-1] += piece
        elif piece:
            reads.append(piece)
    if chance.random() < 0.4:
        which = chance.randrange(len(reads))
        damaged = bytearray(reads[which])
        place = chance.randrange(len(damaged))
        damaged[place : place + chance.randint(0, 2)] = chance.choice((b"", b"0", b"\r", b"\n", b"\r\n", b"f", b"\x00"))
        reads[which] = bytes(damaged)
    return [read for read in reads if read]


def test_the_opening_of_a_chunk_is_the_one_that_we_write() -> None:
    for length in range(70_000):
        opening = chunk_opening(length)
        sizes = [max(0, length - digits - 4) for digits in range(1, CHUNK_DIGITS_MAX)]
        fitting = [b"%x\r\n" % size for size in sizes if size and len(b"%x\r\n\r\n" % size) + size == length]
        assert fitting == ([] if not opening else [opening])


async def test_chunks_are_spliced_and_counted(wired: Wired) -> None:
    wired.front.data_received(ASK)
    await wired.settle()
    for part in (HEAD, chunk(EVENT)):
        wired.back.data_received(part)
    assert wired.back.spliced_bytes == 0  # the first shows that the service chunks as it says
    for count in range(1, 4):
        wired.client.take()
        wired.back.data_received(chunk(EVENT))
        assert wired.client.take() == chunk(EVENT)
        assert wired.back.spliced_bytes == count * len(EVENT)
    assert (await answered([HEAD, *[chunk(EVENT)] * 4, END])).bytes_out == [4 * len(EVENT)]
    assert (await answered([HEAD, *[chunk(EVENT)] * 4])).bytes_out == [4 * len(EVENT)]


async def test_what_the_end_of_the_process_breaks_is_noted_before_the_log_is_closed() -> None:
    usage = Usage()
    wired = Wired(usage=usage)
    wired.front.data_received(ASK)
    await wired.settle()
    for part in (HEAD, chunk(EVENT)):
        wired.back.data_received(part)
    wired.relay.close()  # the log is flushed in the same turn of the loop
    assert usage.bytes_out == [len(EVENT)]
    await wired.settle()
    assert len(usage.bytes_out) == 1
    wired.close()


async def test_what_is_spliced_is_what_the_parser_would_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and damaged streams in any pieces, with the splice and without it."""
    chance = random.Random(20261121)
    ended = 0
    for _ in range(300):
        reads = parts_of(chance)
        spliced = await answered(reads)
        with monkeypatch.context() as without:
            without.setattr(pool, "chunk_opening", lambda _: b"")
            assert await answered(reads) == spliced, reads
        ended += spliced.is_whole
    assert 50 < ended < 250


async def test_a_stream_may_be_cut_anywhere() -> None:
    whole = HEAD + chunk(EVENT) * 3 + chunk(b"x" * 16) + END
    outcomes = set()
    for a, b in itertools.combinations(range(len(HEAD), len(whole), 3), 2):
        outcome = await answered([whole[:a], whole[a:b], whole[b:]])
        outcomes.add((outcome.body, outcome.is_whole, outcome.is_client_closed, outcome.is_service_closed))
    assert outcomes == {(EVENT * 3 + b"x" * 16, True, False, False)}


async def test_what_is_as_long_as_no_chunk_is_none(wired: Wired) -> None:
    wired.front.data_received(ASK)
    await wired.settle()
    for part in (HEAD, chunk(EVENT), chunk(EVENT), b"\n" + b"x" * 18 + b"\r\n"):
        assert not wired.client.is_closed
        wired.back.data_received(part)
    assert wired.client.is_closed
    assert b"xxx" not in wired.client.take()


async def test_a_connection_serves_the_next_request_after_a_spliced_stream(wired: Wired) -> None:
    for _ in range(3):
        wired.front.data_received(ASK)
        await wired.settle()
        for part in (HEAD, *[chunk(EVENT)] * 3, END):
            wired.back.data_received(part)
        assert read_chunked(wired.client.take())[1:] == (EVENT * 3, True)
        assert wired.service.take().count(b"POST ") == 1
    wired.back.data_received(chunk(EVENT))  # nobody asked
    assert wired.service.is_closed
    assert wired.client.take() == b""


async def test_an_old_client_gets_no_chunks(wired: Wired) -> None:
    wired.front.data_received(ASK.replace(b"HTTP/1.1", b"HTTP/1.0"))
    await wired.settle()
    for part in (HEAD, *[chunk(EVENT)] * 4, END):
        wired.back.data_received(part)
    assert wired.client.take().partition(b"\r\n\r\n")[2] == EVENT * 4
    assert wired.client.is_closed


async def test_what_is_spliced_moves_and_what_stalls_breaks() -> None:
    wired = Wired(timeouts=Timeouts(first_byte_s=300, idle_s=60, total_s=3_600))
    now_s = wired.relay.now_s()
    wired.relay.now_s = wired.back.loop_time_s = lambda: now_s
    wired.front.data_received(ASK)
    await wired.settle()
    wired.back.data_received(HEAD + chunk(EVENT))
    for _ in range(5):
        now_s += 59
        wired.back.data_received(chunk(EVENT))
        wired.relay._sweep()
        assert not wired.client.is_closed
    now_s += 59
    wired.relay._sweep()
    assert not wired.client.is_closed
    now_s += 2
    wired.relay._sweep()
    assert wired.client.is_closed
    assert wired.service.is_closed
    assert not wired.client.take().endswith(END)
    wired.close()


async def test_a_client_that_is_full_holds_a_spliced_stream(wired: Wired) -> None:
    wired.front.data_received(ASK)
    await wired.settle()
    for part in (HEAD, chunk(EVENT), chunk(EVENT)):
        wired.back.data_received(part)
    wired.front.pause_writing()
    assert wired.service.is_held
    wired.front.resume_writing()
    assert not wired.service.is_held
    wired.front.connection_lost(None)
    assert wired.service.is_closed
