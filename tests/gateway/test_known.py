"""A head that came before is not read again, and means what it meant: with the memory and without it, byte for byte."""

import random
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.gateway import known
from services.gateway.heads import RequestHead
from services.gateway.known import Asked, Cut, KnownHeads, cut
from services.gateway.target import Targets
from services.gateway.upstreams import RouteTable
from tests.gateway.wires import Wired

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Kind: a\r\nContent-Length: %d\r\n\r\n"
POST = HEAD % 11 + b'{"a": true}'
GET = b"GET /v1/models?q=1 HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OURS = re.compile(rb"(x-request-id|x-tollgate-identity): \S+")


class Forgetful(KnownHeads):
    """Remembers nothing: every head goes through llhttp."""

    def remember(self, asked: Asked) -> None:
        asked.cut = None


def wired(*, remembers: bool = True) -> Wired:
    made = Wired()
    made.relay.known_heads = KnownHeads() if remembers else Forgetful()
    return made


@pytest_asyncio.fixture
async def knowing() -> AsyncIterator[Wired]:
    made = wired()
    yield made
    made.close()


async def passed(wire: Wired, parts: list[bytes]) -> list[bytes]:
    """Everything that the service sees of what comes in these pieces, each request answered."""
    seen = []
    for part in parts:
        if wire.client.is_closed:
            break
        wire.front.data_received(part)
        await wire.settle()
        while got := wire.service.take():
            seen.append(got)
            if wire.service.is_closed or wire.client.is_closed:
                break
            wire.back.data_received(ANSWER)
            await wire.settle()
    return seen


def joined(seen: list[bytes]) -> bytes:
    return OURS.sub(rb"\1: -", b"".join(seen))


def damaged(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(0, 2)):
        place = chance.randrange(len(changed))
        what = chance.randrange(3)
        if what == 0:
            changed[place] = chance.randrange(256)
        elif what == 1:
            del changed[place : place + chance.randint(1, 4)]
        else:
            changed[place:place] = chance.choice(
                (b"\r\n", b"\n", b" ", b"0", b"1", b"\r", b"Content-Length: 3\r\n", b"content-length: 11\r\n")
            )
    return bytes(changed)


async def test_what_the_service_sees_is_the_same_with_the_memory_and_without() -> None:
    """Lawful and damaged requests, whole and in pieces, after lawful ones that are remembered."""
    chance = random.Random(20261121)
    for _ in range(400):
        before = [POST, GET]
        stream = b"".join(damaged(chance, chance.choice((POST, GET, HEAD % 3 + b"abc"))) for _ in range(3))
        edges = sorted(chance.randrange(len(stream)) for _ in range(chance.randint(0, 3)))
        parts = [stream[a:b] for a, b in zip([0, *edges], [*edges, len(stream)], strict=True) if a < b]
        outcomes = []
        for remembers in (True, False):
            wire = wired(remembers=remembers)
            seen = await passed(wire, [*before, *parts])
            outcomes.append((joined(seen), wire.client.is_closed, wire.client.take()[9:12]))
            wire.close()
        assert outcomes[0] == outcomes[1], parts


@pytest.mark.parametrize("request_bytes", [POST, GET], ids=["POST", "GET"])
async def test_a_known_request_split_at_any_byte_is_the_same_request(knowing: Wired, request_bytes: bytes) -> None:
    wanted = joined(await passed(knowing, [request_bytes]))
    for at in range(1, len(request_bytes)):
        knowing.front.data_received(request_bytes[:at])
        if at % 2:
            await knowing.settle()
        knowing.front.data_received(request_bytes[at:])
        await knowing.settle()
        assert joined([knowing.service.take()]) == wanted
        knowing.back.data_received(ANSWER)
    assert not knowing.client.is_closed


async def test_only_the_length_may_differ(knowing: Wired) -> None:
    await passed(knowing, [POST])
    for body in (b"", b"x", b"y" * 5_000):
        assert joined(await passed(knowing, [HEAD % len(body) + body])).endswith(
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
    other = joined(await passed(knowing, [POST.replace(b"X-Kind: a", b"X-Kind: b")]))
    assert b"x-kind: b" in other


async def test_known_requests_in_one_piece_are_all_answered(knowing: Wired) -> None:
    await passed(knowing, [POST])
    seen = await passed(knowing, [POST + GET + POST])
    assert [got.split(b" ")[0] for got in seen] == [b"POST", b"GET", b"POST"]


async def test_a_known_head_with_a_body_that_is_too_large_is_refused_as_any_other(knowing: Wired) -> None:
    await passed(knowing, [POST])
    knowing.client.take()
    assert not await passed(knowing, [HEAD % 100_001 + b"x"])
    assert knowing.client.take().startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST.replace(b"Content-Length", b"CONTENT-LENGTH"),
        POST.replace(b"Content-Length: 11", b"content-length:11"),
        POST.replace(b"Content-Length: 11\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nb\r\n") + b"\r\n0\r\n\r\n",
        GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        GET.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["another case", "no space", "chunked", "close", "HTTP/1.0"],
)
async def test_what_is_not_plain_is_read_each_time(knowing: Wired, request_bytes: bytes) -> None:
    assert len(await passed(knowing, [request_bytes])) == 1
    assert not knowing.relay.known_heads._asked


async def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "HEADS_MAX", 3)
    heads, target = KnownHeads(), Targets(RouteTable()).find(b"/v1/models")
    for i in range(10):
        asked = Asked("GET", target, [], "1.1", True, Cut(b"%d" % i, None, 0))
        asked.head = RequestHead()
        heads.remember(asked)
        assert heads.find(Cut(b"%d" % i, None, 0)) is asked
        assert len(heads._asked) <= 3
    assert cut(b"GET /" + b"x" * 3_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n") is None
