"""Commands as Redis reads them."""

from __future__ import annotations

import hiredis

Argument = str | bytes | int | float


def pack(*command: Argument) -> bytes:
    """A whole command."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


def encoded(*arguments: Argument) -> bytes:
    """Arguments as a part of one."""
    packed = pack(*arguments)
    return packed[packed.index(b"\r\n") + 2 :]
