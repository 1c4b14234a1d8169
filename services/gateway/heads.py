"""Heads of requests and responses: what is read from them, and what goes on to the other side.

    client's headers ──read_request──► RequestHead: facts, and the lines that the service may see
    service's headers ──response_lines──► the lines that the client may see

One pass over each. Whatever is for one hop only, names a caller or could be mistaken for ours stays behind. Framing is
never copied: who sends a body states its length or chunks it himself. llhttp has refused before, in its strict mode,
what is no HTTP: control characters in values, bare line feeds, two lengths, a length beside an encoding.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from services.gateway.errors import HeadersTooLarge
from services.gateway.usage import BUILD_HEADER
from shared.errors import InvalidRequest, Unauthenticated

if TYPE_CHECKING:
    from services.gateway.admission import Asker

RawHeaders = list[tuple[bytes, bytes]]

HEADER_BYTES_MAX = 32 * 1024
HEADERS_MAX = 100
LENGTH_DIGITS_MAX = 15
INTERNAL_PREFIX = b"x-tollgate-"
BUILD = BUILD_HEADER.encode()
HOP_BY_HOP = (
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
)
NOT_FORWARDED = frozenset(
    (
        *HOP_BY_HOP,
        b"authorization",
        b"content-length",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"x-api-key",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-proto",
        b"x-real-ip",
        b"x-request-id",
    )
)
NOTED = frozenset(
    (b"accept-encoding", b"access-control-request-method", b"origin", b"traceparent", b"tracestate", b"x-csrf-token")
)  # read here, and forwarded all the same
TRACE_LINES = (b"traceparent:", b"tracestate:")
SINGLE = (b"authorization", b"x-api-key", b"content-length", b"host", b"transfer-encoding")
NOT_RETURNED = frozenset(
    (
        *HOP_BY_HOP,
        b"content-length",
        b"content-security-policy",
        b"date",
        b"ratelimit",
        b"ratelimit-policy",
        b"referrer-policy",
        b"server",
        b"strict-transport-security",
        b"via",
        b"x-content-type-options",
        b"x-frame-options",
        b"x-powered-by",
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
        b"x-request-id",
    )
)
KEPT_BACK = (INTERNAL_PREFIX, b"access-control-")
ABOUT_BODY = frozenset((b"content-type", b"content-encoding", b"cache-control", b"etag"))
COMPRESSIBLE = frozenset((b"application/json", b"application/problem+json", b"text/plain", b"text/html", b"text/csv"))
OWN_CONNECTION_OPTIONS = frozenset((b"keep-alive", b"close", b""))
_READ: Final = {name: name in NOTED for name in NOT_FORWARDED | NOTED}


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class RequestHead:
    """`known` holds the headers that matter here, the first of each name; `lines` what goes on, each with its end.

    `asker`: who asks, once admission knows.
    """

    __slots__ = ("asker", "is_chunked", "known", "length", "lines", "options")

    def __init__(self) -> None:
        self.asker: Asker | None = None
        self.known: dict[bytes, bytes] = {}
        self.lines = b""
        self.options: frozenset[bytes] = frozenset()
        self.length: int | None = None
        self.is_chunked = False

    def text(self, name: bytes) -> str | None:
        value = self.known.get(name)
        return None if value is None else value.decode("latin-1")


def read_request(headers: RawHeaders, *, has_own_trace: bool = False) -> RequestHead:
    """Read a request's headers, names in lower case. `has_own_trace`: ours goes on in place of the client's.

    Raises HeadersTooLarge, Unauthenticated for two credentials of a kind, InvalidRequest for framing that two servers
    could read in two ways.
    """
    head = RequestHead()
    known = head.known
    lines: list[bytes] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value)
        is_forwarded = _READ.get(name)
        if is_forwarded is None:
            if not name.startswith(INTERNAL_PREFIX):
                lines.append(b"%b: %b\r\n" % (name, value))
            continue
        if is_forwarded:
            lines.append(b"%b: %b\r\n" % (name, value))
        if name not in known:
            known[name] = value
        elif name == b"connection":
            known[name] += b"," + value
        elif name in SINGLE:
            raise _repeated(name)
    if has_own_trace:
        lines = [line for line in lines if not line.startswith(TRACE_LINES)]
    if size > HEADER_BYTES_MAX or len(headers) > HEADERS_MAX:
        raise HeadersTooLarge()
    _read_framing(head)
    if b"connection" in known:
        head.options = connection_options(known[b"connection"])
        if not head.options <= OWN_CONNECTION_OPTIONS:
            lines = [line for line in lines if line.partition(b":")[0] not in head.options]
    head.lines = b"".join(lines)
    return head


def _repeated(name: bytes) -> InvalidRequest | Unauthenticated:
    if name in (b"authorization", b"x-api-key"):
        return Unauthenticated()
    return InvalidRequest(f"The header {name.decode('latin-1')} may be sent only once.", code="repeated_header")


def _read_framing(head: RequestHead) -> None:
    length, encoding = head.known.get(b"content-length"), head.known.get(b"transfer-encoding")
    if encoding is not None:
        if length is not None or encoding.lower() != b"chunked":
            raise InvalidRequest("The only transfer encoding here is chunked, alone.", code="invalid_framing")
        head.is_chunked = True
    elif length is not None:
        if not length.isdigit() or len(length) > LENGTH_DIGITS_MAX:
            raise InvalidRequest("Content-Length is not a number.", code="invalid_content_length")
        head.length = int(length)


def connection_options(value: bytes) -> frozenset[bytes]:
    """The names that a Connection header declares to be for this hop only."""
    return frozenset([option.strip().lower() for option in value.split(b",")])


class ResponseHead:
    """What the relay wants to know of a service's response; `lines` as in RequestHead."""

    __slots__ = ("build", "content_type", "has_policy", "is_encoded", "is_fixed", "lines")

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.build = b""
        self.content_type = b""
        self.is_encoded = False
        self.is_fixed = False
        self.has_policy = False

    def note(self, name: bytes, value: bytes) -> None:
        """One of ABOUT_BODY."""
        if name == b"content-type":
            self.content_type = value
        elif name == b"content-encoding":
            self.is_encoded = True
        elif name == b"cache-control":
            self.has_policy = True
            self.is_fixed = self.is_fixed or b"no-transform" in value.lower()
        else:
            self.is_fixed = True  # a strong validator names these bytes and no others

    @property
    def is_compressible(self) -> bool:
        """Whether other bytes may stand for these: text, not encoded yet, and nothing forbids it."""
        kind = self.content_type.partition(b";")[0].strip().lower()
        return kind in COMPRESSIBLE and not self.is_encoded and not self.is_fixed


def read_response(headers: RawHeaders) -> ResponseHead:
    """Read a service's headers, names in lower case."""
    head = ResponseHead()
    lines = head.lines
    options: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name in NOT_RETURNED:
            if name == b"connection":
                options |= connection_options(value)
            continue
        if name.startswith(KEPT_BACK):
            head.build = value if name == BUILD else head.build
            continue
        if name in ABOUT_BODY:
            head.note(name, value)
        lines.append(b"%b: %b\r\n" % (name, value))
    if not options <= OWN_CONNECTION_OPTIONS:
        head.lines = [line for line in lines if line.partition(b":")[0] not in options]
    return head
