"""Heads of requests that have come before, byte for byte, and are not read again.

    bytes of a connection between two messages ──cut──► head without its length ──► Asked, as llhttp and we read it then

What a head means follows from its bytes alone, so what was once read from them still holds; only the digits of its
Content-Length may be others, which mean nothing but the length. Whatever else comes goes through llhttp: heads in
pieces, chunked bodies, and what follows in the same bytes. Only heads of admitted keys are remembered, so that nobody
without a key can fill this memory, and only those after which the connection stays open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from services.gateway.heads import RawHeaders, RequestHead
from services.gateway.target import Target

HEADS_MAX = 1_024
HEAD_BYTES_MAX = 2 * 1024
DIGITS_MAX = 9
END = b"\r\n\r\n"
LENGTHS = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")


@dataclass(slots=True, eq=False, repr=False)
class Asked:
    """A request without its body: what came before it, and what is read from that once it is the request's turn.

    `cut`: as what it may be remembered; None: it may not. `opening`: the service's request up to the name of its host.
    """

    method: str
    target: Target
    headers: RawHeaders
    version: str
    keep_alive: bool
    cut: Cut | None = None
    head: RequestHead | None = None
    opening: bytes = b""


class Cut(NamedTuple):
    """A head found in what came: its bytes without the length's digits, that length, and where the body begins."""

    name: bytes
    length: int | None
    body_at: int


class KnownHeads:
    """See the module."""

    def __init__(self) -> None:
        self._asked: dict[bytes, Asked] = {}

    def find(self, cut: Cut) -> Asked | None:
        return self._asked.get(cut.name)

    def remember(self, asked: Asked) -> None:
        """A request that was admitted by its key. One whose length we did not find as llhttp did is not taken."""
        found, head, asked.cut = asked.cut, asked.head, None
        if found is None or head is None or head.is_chunked or not asked.keep_alive or head.length != found.length:
            return
        if len(self._asked) >= HEADS_MAX:
            self._asked.clear()
        self._asked[found.name] = asked


def cut(data: bytes) -> Cut | None:
    """The head at the beginning of a message, where all of it is there and it may be a known one."""
    end = data.find(END, 0, HEAD_BYTES_MAX)
    if end < 0:
        return None
    for length_name in LENGTHS:
        at = data.find(length_name, 0, end)
        if at > 0:
            at += len(length_name)
            stop = data.find(b"\r\n", at)
            digits = data[at:stop]
            if not digits.isdigit() or len(digits) > DIGITS_MAX:
                return None
            return Cut(data[:at] + data[stop:end], int(digits), end + len(END))
    return Cut(data[:end], None, end + len(END))
