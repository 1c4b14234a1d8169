"""What two servers could read in two ways is refused; what passes, nginx passes as the same requests."""

import asyncio
import contextlib
import random
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deploy.local.ports import pick_port
from tests.gateway.harness import Backend, Directory, Gateway, Key
from tests.gateway.outages import DEADLINE_S, eventually

CHAT = b"/v1/chat/completions"
QUIET_S = 3.0
CASES = 300
Request = tuple[str, str, bytes]
NGINX = """
worker_processes 1;
daemon off;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  upstream service {{ server {service}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://service;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
  }}
}}
"""


def smuggled(headers: bytes, body: bytes, line: bytes = b"POST " + CHAT + b" HTTP/1.1") -> bytes:
    return line + b"\r\nHost: x\r\n%KEY%" + headers + b"\r\n\r\n" + body


HIDDEN = b"GET /v1/models/hidden HTTP/1.1\r\nHost: x\r\n%KEY%\r\n"
CORPUS = {
    "length and encoding": smuggled(b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\n" + HIDDEN),
    "encoding and length": smuggled(b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"0\r\n\r\n" + HIDDEN),
    "two lengths": smuggled(b"Content-Length: 0\r\nContent-Length: 60", HIDDEN),
    "two equal lengths": smuggled(b"Content-Length: 0\r\nContent-Length: 0", HIDDEN),
    "a list of lengths": smuggled(b"Content-Length: 0, 0", HIDDEN),
    "a signed length": smuggled(b"Content-Length: +0", HIDDEN),
    "a negative length": smuggled(b"Content-Length: -1", HIDDEN),
    "a hexadecimal length": smuggled(b"Content-Length: 0x0", HIDDEN),
    "a long length": smuggled(b"Content-Length: 99999999999999999999999999", HIDDEN),
    "an empty length": smuggled(b"Content-Length: ", HIDDEN),
    "a space before the colon": smuggled(b"Content-Length : 60", HIDDEN),
    "a folded encoding": smuggled(b"X: y\r\n Transfer-Encoding: chunked", b"0\r\n\r\n" + HIDDEN),
    "another encoding": smuggled(b"Transfer-Encoding: gzip", HIDDEN),
    "two encodings": smuggled(b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n" + HIDDEN),
    "chunked twice": smuggled(b"Transfer-Encoding: chunked, chunked", b"0\r\n\r\n" + HIDDEN),
    "two encoding headers": smuggled(
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", b"0\r\n\r\n" + HIDDEN
    ),
    "identity": smuggled(b"Transfer-Encoding: identity", HIDDEN),
    "an invented encoding": smuggled(b"Transfer-Encoding: xchunked", b"0\r\n\r\n" + HIDDEN),
    "a quoted encoding": smuggled(b'Transfer-Encoding: "chunked"', b"0\r\n\r\n" + HIDDEN),
    "a vertical tab": smuggled(b"Transfer-Encoding:\x0bchunked", b"0\r\n\r\n" + HIDDEN),
    "a bare line feed": smuggled(b"X: y\nTransfer-Encoding: chunked", b"0\r\n\r\n" + HIDDEN),
    "a bare carriage return": smuggled(b"X: y\rTransfer-Encoding: chunked", b"0\r\n\r\n" + HIDDEN),
    "a zero byte": smuggled(b"X: a\x00b\r\nContent-Length: 0", HIDDEN),
    "a negative chunk": smuggled(b"Transfer-Encoding: chunked", b"-1\r\nx\r\n0\r\n\r\n" + HIDDEN),
    "a chunk that is too long": smuggled(b"Transfer-Encoding: chunked", b"3\r\nabcdef\r\n0\r\n\r\n" + HIDDEN),
    "a huge chunk": smuggled(b"Transfer-Encoding: chunked", b"fffffffffffffffff0\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "a chunk with a bare line feed": smuggled(b"Transfer-Encoding: chunked", b"3\nabc\n0\n\n" + HIDDEN),
    "no version": smuggled(b"Content-Length: 0", HIDDEN, b"GET /v1/models"),
    "another version": smuggled(b"Content-Length: 0", HIDDEN, b"POST " + CHAT + b" HTTP/3.7"),
    "an encoding in HTTP/1.0": smuggled(
        b"Transfer-Encoding: chunked", b"0\r\n\r\n" + HIDDEN, b"POST " + CHAT + b" HTTP/1.0"
    ),
    "a space in the address": smuggled(b"Content-Length: 0", HIDDEN, b"GET /v1/models /x HTTP/1.1"),
    "two hosts": smuggled(b"Host: y\r\nContent-Length: 0", HIDDEN),
}
LAWFUL = (
    b"POST " + CHAT + b'?case=%CASE% HTTP/1.1\r\nHost: x\r\n%KEY%Content-Length: 12\r\n\r\n{"a": "b c"}',
    b"POST " + CHAT + b"?case=%CASE% HTTP/1.1\r\nHost: x\r\n%KEY%Transfer-Encoding: chunked\r\n\r\n"
    b"4\r\nabcd\r\n1;x=y\r\ne\r\n0\r\nX-T: 1\r\n\r\n",
    b"GET /v1/models?case=%CASE% HTTP/1.1\r\nHost: x\r\n%KEY%Accept: */*\r\n\r\n",
)
INSERTED = (
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\x00",
    b"0",
    b"1",
    b":",
    b",",
    b"Content-Length: 3\r\n",
    b"\xff",
    b"Transfer-Encoding: chunked\r\n",
    b"\r\n\r\n",
    b"chunked",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
)


async def exchange(port: int, data: bytes, quiet_s: float = QUIET_S) -> bytes:
    """Send all of it; what comes back until the connection closes or is quiet."""
    got = b""
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        with contextlib.suppress(TimeoutError):
            while piece := await asyncio.wait_for(reader.read(65_536), quiet_s):
                got += piece
        writer.close()
    return got


def port_of(gateway: Gateway) -> int:
    return int(gateway.url.rpartition(":")[2])


@pytest_asyncio.fixture
async def key(directory: Directory) -> Key:
    return await directory.create_key(limits={"minute": 100_000, "hour": 100_000, "day": 100_000, "concurrency": 0})


async def test_no_request_hides_in_another(gateway: Gateway, backend: Backend, key: Key) -> None:
    credential = f"Authorization: Bearer {key.secret}\r\n".encode()

    async def is_refused(name: str) -> None:
        got = await exchange(port_of(gateway), CORPUS[name].replace(b"%KEY%", credential), DEADLINE_S)
        assert re.match(rb"HTTP/1\.1 (400|413) ", got), (name, got[:200])
        assert got.count(b"HTTP/1.1 ") == 1, name  # and the connection is closed: what follows is nobody's request
        assert key.secret.encode() not in got

    await asyncio.gather(*(is_refused(name) for name in CORPUS))
    assert not backend.seen


async def test_a_header_that_was_let_in_stays_one_header(gateway: Gateway, backend: Backend, key: Key) -> None:
    for value in (b"a\r\nX-Tollgate-Identity: forged", b"a%0d%0aX-Tollgate-Identity: forged", b"\xc3\xa9\xff\x80"):
        head = b"POST " + CHAT + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n"
        request = head + f"Authorization: {key.secret}\r\n".encode() + b"X-Request-Id: " + value + b"\r\nX-V: " + value
        got = await exchange(port_of(gateway), request + b"\r\n\r\n", DEADLINE_S)
        assert got.startswith(b"HTTP/1.1 200"), got
        assert b"forged" not in got
        assert [v for k, v in backend.last.headers if k.startswith("x-tollgate")] != ["forged"]
        assert sum(k.startswith("x-tollgate") for k, _ in backend.last.headers) == 1


@contextlib.asynccontextmanager
async def nginx(service: str) -> AsyncIterator[int]:
    binary = shutil.which("nginx")
    if binary is None:
        pytest.skip("nginx is not installed: .ci/run unpacks it")
    directory, port = tempfile.mkdtemp(prefix="tollgate-test-nginx-"), pick_port()
    Path(directory).chmod(0o755)
    configuration = Path(directory, "nginx.conf")
    configuration.write_text(NGINX.format(directory=directory, service=service.partition("//")[2], port=port))
    process = await asyncio.create_subprocess_exec(
        binary, "-p", directory, "-c", str(configuration), stderr=asyncio.subprocess.DEVNULL
    )
    try:

        async def answers() -> bool:
            return bool(await exchange(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))

        await eventually(answers)
        yield port
    finally:
        process.terminate()
        await process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def damaged(chance: random.Random, case: int, key: bytes) -> bytes:
    """Three lawful requests, one of them with up to three changes outside its number and its key."""
    parts = [chance.choice(LAWFUL) for _ in range(3)]
    victim = chance.randrange(3)
    for _ in range(chance.randint(0, 3)):
        whole = parts[victim]
        kept = [m.span() for m in re.finditer(rb"case=%CASE%|%KEY%", whole)]
        places = [i for i in range(len(whole)) if not any(a <= i < b for a, b in kept)]
        place = chance.choice(places)
        if chance.random() < 0.6:
            parts[victim] = whole[:place] + chance.choice(INSERTED) + whole[place:]
        else:
            parts[victim] = whole[:place] + whole[place + 1 :]
    return b"".join(parts).replace(b"%CASE%", b"%d" % case).replace(b"%KEY%", key)


def is_subsequence(some: list[Request], whole: list[Request]) -> bool:
    rest = iter(whole)
    return all(any(request == other for other in rest) for request in some)


class Passed:
    """The requests that reached the service, by their case."""

    def __init__(self, backend: Backend) -> None:
        backend.seen.clear()
        self._backend = backend
        self._looked_at = 0
        self._found: dict[int, list[Request]] = defaultdict(list)

    def of(self, case: int) -> list[Request]:
        seen, self._looked_at = self._backend.seen[self._looked_at :], len(self._backend.seen)
        for one in seen:
            if match := re.search(r"case=(\d+)", one.query):
                self._found[int(match.group(1))].append((one.method, f"{one.path}?{one.query}", one.body))
        return self._found[case]


async def test_what_passes_nginx_passes_as_the_same_requests(gateway: Gateway, backend: Backend, key: Key) -> None:
    """All that we passed, and in that order; a path that is nobody's ends at the gateway and not at nginx."""
    chance, slots = random.Random(14), asyncio.Semaphore(100)
    credential = f"Authorization: Bearer {key.secret}\r\n".encode()
    inputs = [damaged(chance, case, credential) for case in range(CASES)]

    async def feed(case: int) -> None:
        async with slots:
            await exchange(port_of(gateway), inputs[case])

    ours = Passed(backend)
    await asyncio.gather(*map(feed, range(CASES)))
    passed = {case: requests for case in range(CASES) if (requests := list(ours.of(case)))}
    assert len(passed) > CASES // 4
    async with nginx(backend.url) as port:
        theirs = Passed(backend)

        async def is_passed_too(case: int) -> None:
            async with slots:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(inputs[case])
                await eventually(lambda: is_subsequence(passed[case], theirs.of(case)))
                writer.close()

        outcomes = await asyncio.gather(*map(is_passed_too, passed), return_exceptions=True)
    differing = [inputs[case] for case, outcome in zip(passed, outcomes, strict=True) if outcome]
    assert not differing, differing[0]
