"""Requests that nobody wants any more: at any moment the engine stops, and nothing is held."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from deploy.local.triton import regions
from tests.inference.client import BackendClient, ModelError, Stream, chat, count
from tests.inference.conftest import RunningTriton
from tests.inference.test_backend import LONG_TOKENS, arrived, busy, eventually, idle, refusal

SPARE_DESCRIPTORS = 8  # what comes and goes


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def leave(backend: BackendClient, stream: Stream, is_told: bool) -> None:
    """As a caller that lives does, or as one that dies does."""
    if not is_told:
        stream.cancel()
        return
    assert await backend.cancel("narrow", stream)
    assert await refusal(stream.all()) == "cancelled"


async def rest_of(stream: Stream) -> None:
    """Read a stream that was cancelled, or not in time, to its end."""
    with contextlib.suppress(ModelError):
        await stream.all()


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_cancel_in_mid_stream_stops_the_engine_and_frees_the_slot(
    backend: BackendClient, triton: RunningTriton, is_told: bool
) -> None:
    before = await idle(backend, triton, "narrow")
    stream = backend.send("narrow", chat(tokens=LONG_TOKENS))
    await stream.first(3)
    await leave(backend, stream, is_told)
    after = await idle(backend, triton, "narrow")
    assert after["cancelled_total"] == before["cancelled_total"] + 1
    assert after["completion_tokens_total"] - before["completion_tokens_total"] < LONG_TOKENS / 2


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_cancel_during_prefill_stops_before_the_first_token(
    backend: BackendClient, triton: RunningTriton, is_told: bool
) -> None:
    before = await idle(backend, triton, "narrow")
    (ten,) = await backend.send("narrow", count("hello " * 10)).all()
    text = "hello " * (900 * 10 // ten["prompt_tokens"])  # about a hundred batches of prefill
    stream = backend.send("narrow", chat(text, tokens=200))
    await arrived(backend, "narrow")
    await leave(backend, stream, is_told)
    after = await idle(backend, triton, "narrow")
    assert after["cancelled_total"] == before["cancelled_total"] + 1
    assert after["completion_tokens_total"] == before["completion_tokens_total"]


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_cancel_in_the_queue_never_reaches_the_engine(
    backend: BackendClient, triton: RunningTriton, is_told: bool
) -> None:
    before = await idle(backend, triton, "narrow")
    running = await busy(backend, streams=3)
    waiting = backend.send("narrow", chat(tokens=5), tenant="impatient")
    await arrived(backend, "narrow")
    await leave(backend, waiting, is_told)
    for stream in running:
        await stream.all()
    after = await idle(backend, triton, "narrow")
    assert after["cancelled_total"] == before["cancelled_total"] + 1
    assert after["completion_tokens_total"] == before["completion_tokens_total"] + 3 * LONG_TOKENS


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cancels", [200, pytest.param(10_000, marks=pytest.mark.torture)])
async def test_after_many_cancels_at_random_moments_nothing_is_held(
    backend: BackendClient, triton: RunningTriton, cancels: int
) -> None:
    stub, stack_id = triton.stub("churned"), triton.server.layout.stack_id
    descriptors, memory = open_files(stub), set(regions(stack_id))
    chance = random.Random(7)
    limit = asyncio.Semaphore(12)

    async def one() -> None:
        async with limit:
            text = "hello " * chance.randrange(1, 200)
            stream = backend.send("churned", chat(text, tokens=chance.randrange(1, 60)))
            chunks, after_s = chance.randrange(0, 20), chance.random() * 0.05
            if chunks:
                await stream.first(chunks)
            else:
                await asyncio.sleep(after_s)
            rest = asyncio.create_task(rest_of(stream))
            while not await backend.cancel("churned", stream) and not rest.done():
                await asyncio.sleep(0.01)  # it is on its way to the build, or its end is on its way here
            await rest

    await asyncio.gather(*(one() for _ in range(cancels)))
    await eventually(lambda: triton.metrics("churned")["slots_busy"] == 0, "slots are held")
    # All four slots take work: four streams have begun before any of them ends.
    streams = [backend.send("churned", chat(tokens=400)) for _ in range(4)]
    await asyncio.gather(*(stream.first(1) for stream in streams))
    assert not any(stream.finished for stream in streams)
    for chunks in await asyncio.gather(*(stream.all() for stream in streams)):
        assert chunks[-1]["usage"]["completion_tokens"] == 400
    figures = triton.metrics("churned")
    assert figures["queue_depth"] == 0
    assert open_files(stub) <= descriptors + SPARE_DESCRIPTORS
    assert set(regions(stack_id)) == memory
