"""Identifiers: UUIDv7 (RFC 9562 §5.7), sorted by time of making, and request ids."""

from __future__ import annotations

import os
import re
import time
from uuid import UUID

from asyncpg.pgproto.pgproto import UUID as FastUUID

_MS_MAX = (1 << 48) - 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{8,64}\Z")


class _Randomness:
    """Random bytes, RESERVE_BYTES at a time: a system call each costs more than the rest of an id."""

    RESERVE_BYTES = 8_000
    BYTES = 10

    def __init__(self) -> None:
        self._reserve = ""
        self._used = 0
        os.register_at_fork(after_in_child=self._forget)

    def take(self) -> str:
        """BYTES of them as hexadecimal digits."""
        used = self._used
        if used >= len(self._reserve):
            self._reserve, used = os.urandom(self.RESERVE_BYTES).hex(), 0
        self._used = used + 2 * self.BYTES
        return self._reserve[used : self._used]

    def _forget(self) -> None:
        self._reserve, self._used = "", 0


_randomness = _Randomness()


def as_uuid(value: str | bytes) -> UUID:
    """The UUID of that text, or of those 16 bytes. Raises ValueError.

    asyncpg's class, which is a `uuid.UUID` written in C: making, writing and hashing one is 3 to 12 times as fast.
    """
    made: UUID = FastUUID(value)
    return made


def uuid7(unix_ms: int | None = None) -> UUID:
    """A UUIDv7: 48 bits of milliseconds, then 74 random bits."""
    ms = time.time_ns() // 1_000_000 if unix_ms is None else unix_ms
    random = _randomness.take()
    variant = "89ab"[int(random[3], 16) & 3]
    return as_uuid(f"{ms & _MS_MAX:012x}7{random[:3]}{variant}{random[5:]}")


SERVICE_ACCOUNT_VERSION = 8  # RFC 9562 §5.8: custom


def service_account_id(unix_ms: int | None = None) -> UUID:
    """As `uuid7`, and marked, so that whoever sees nothing but a user's id knows that it is nobody's."""
    made = uuid7(unix_ms)
    return as_uuid((made.int & ~(0xF << 76) | SERVICE_ACCOUNT_VERSION << 76).to_bytes(16, "big"))


def is_service_account(user_id: UUID) -> bool:
    """Whether a user is a service account and no person."""
    return user_id.version == SERVICE_ACCOUNT_VERSION


def request_id() -> str:
    """A new request id: `req_` and 32 hexadecimal digits: 12 of milliseconds, so that they sort by time, 20 random."""
    return f"req_{time.time_ns() // 1_000_000:012x}{_randomness.take()}"


def accepted_request_id(offered: str | None) -> str:
    """A caller's own request id when it is harmless (8 to 64 of [A-Za-z0-9._-]), else a new one."""
    if offered and _REQUEST_ID.match(offered):
        return offered
    return request_id()
