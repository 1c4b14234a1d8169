"""Lua scripts by their digest; the text is sent only to a server that does not know it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from pathlib import Path
from typing import Any

from shared.limits.link import CommandRefused, Link, RedisUnavailable
from shared.limits.resp import Argument, encoded


class Script:
    """One script. A call is repeated only on NOSCRIPT, the one answer that says that nothing ran."""

    def __init__(self, link: Link, text: str) -> None:
        self._link = link
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._by_digest, self._by_text = encoded("EVALSHA", self._sha), encoded("EVAL", text)

    @classmethod
    def read(cls, link: Link, path: Path) -> Script:
        return cls(link, path.read_text())

    async def __call__(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> Any:
        """The script's answer. Raises RedisUnavailable."""
        prepared = self.prepared(names, arguments)
        try:
            return await self._link.call("EVALSHA", self._sha, *prepared)
        except CommandRefused as e:
            if not e.is_noscript:
                raise
        return await self._link.call("EVAL", self._text, *prepared)

    def prepared(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
        """A call's arguments in Redis's order."""
        return (len(names), *names, *arguments)

    def packed(self, count: int, arguments: bytes, *, with_text: bool = False) -> bytes:
        """A call as it is sent; `arguments`: `count` of them, encoded. Without its text it may be NOSCRIPT."""
        return b"*%d\r\n%b%b" % (count + 2, self._by_text if with_text else self._by_digest, arguments)

    def send(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> None:
        """Run it and ignore what comes of it."""

        def sent(call: asyncio.Future[Any]) -> None:
            error = None if call.cancelled() else call.exception()
            if isinstance(error, CommandRefused) and error.is_noscript:
                self._link.send("EVAL", self._text, len(names), *names, *arguments)

        with contextlib.suppress(RedisUnavailable):
            self._link.call("EVALSHA", self._sha, len(names), *names, *arguments).add_done_callback(sent)
