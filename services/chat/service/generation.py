"""The choices of one request, generated at once and told as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from services.chat.triton import Chunk, Generation
from shared.metering import Usage

CHUNKS_WAITING_MAX = 64

Piece = tuple[int, Chunk]


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[Piece, None]:
    """(index, chunk) of every generation as they come. Closing it, or the failure of one, stops them all."""
    if len(generations) == 1:
        async with generations[0] as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    waiting: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(CHUNKS_WAITING_MAX)
    tasks = [asyncio.create_task(_pump(i, g, waiting)) for i, g in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            item = await waiting.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, generation: Generation, waiting: asyncio.Queue[Piece | BaseException | None]) -> None:
    try:
        async with generation as chunks:
            async for chunk in chunks:
                await waiting.put((index, chunk))
    except Exception as e:  # noqa: BLE001 - it is raised where the choices are read
        await waiting.put(e)
    else:
        await waiting.put(None)


class Total:
    """The usage of all choices together. Each reads the prompt for itself."""

    def __init__(self, choices: int) -> None:
        self._usages = [Usage()] * choices

    def add(self, index: int, usage: Usage) -> Usage:
        self._usages[index] = usage
        if len(self._usages) == 1:
            return usage
        return Usage(
            sum(u.input_tokens for u in self._usages),
            sum(u.cached_input_tokens for u in self._usages),
            sum(u.output_tokens for u in self._usages),
        )
