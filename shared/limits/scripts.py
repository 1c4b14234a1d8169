"""Lua scripts by their digest; the text is sent only to a server that does not know it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from pathlib import Path
from typing import Any

from shared.limits.link import Argument, CommandRefused, Link, RedisUnavailable


class Script:
    """One script. A call is repeated only on NOSCRIPT, the one answer that says that nothing ran."""

    def __init__(self, link: Link, text: str) -> None:
        self._link = link
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    @classmethod
    def read(cls, link: Link, path: Path) -> Script:
        return cls(link, path.read_text())

    async def __call__(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> Any:
        """The script's answer. Raises RedisUnavailable."""
        prepared = self.prepared(names, arguments)
        return await self.finish(self.start(prepared), prepared)

    def prepared(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
        """A call as `start` and `finish` take it."""
        return (len(names), *names, *arguments)

    def start(self, prepared: tuple[Argument, ...]) -> asyncio.Future[Any]:
        """Call the script. What comes of it may be NOSCRIPT: `finish` knows what to do. Raises RedisUnavailable."""
        return self._link.call("EVALSHA", self._sha, *prepared)

    async def finish(self, call: asyncio.Future[Any], prepared: tuple[Argument, ...]) -> Any:
        """The answer of a call that was started. Raises RedisUnavailable."""
        try:
            return await call
        except CommandRefused as e:
            if not e.is_noscript:
                raise
        return await self._link.call("EVAL", self._text, *prepared)

    def send(self, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> None:
        """Run it and ignore what comes of it."""

        def sent(call: asyncio.Future[Any]) -> None:
            error = None if call.cancelled() else call.exception()
            if isinstance(error, CommandRefused) and error.is_noscript:
                self._link.send("EVAL", self._text, len(names), *names, *arguments)

        with contextlib.suppress(RedisUnavailable):
            self._link.call("EVALSHA", self._sha, len(names), *names, *arguments).add_done_callback(sent)
