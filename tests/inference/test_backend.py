"""The model contract, on a real tritonserver with a real engine."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deploy.local import processes
from tests.inference.client import BackendClient, ModelError, Stream, chat, count
from tests.inference.conftest import RunningTriton

WAIT_S = 60.0
LONG_TOKENS = 900  # about half a second of the one slot of `narrow`


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that is cheap to look at."""
    deadline = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def idle(backend: BackendClient, triton: RunningTriton, build: str) -> dict[str, float]:
    """Wait until every request that was sent has ended and is in the metrics; these metrics."""

    def is_idle() -> bool:
        figures = triton.metrics(build)
        ended = figures["requests_total"] == backend.sent[build]
        return ended and figures["slots_busy"] == figures["queue_depth"] == 0

    await eventually(is_idle, f"{build} is not idle")
    return triton.metrics(build)


async def arrived(backend: BackendClient, build: str) -> None:
    """What was sent before this is in the model's hands: a later request has been answered."""
    await backend.send(build, count("are you there?")).all()


async def refusal(work: Awaitable[object]) -> str:
    with pytest.raises(ModelError) as caught:
        await work
    return caught.value.code


async def busy(backend: BackendClient, streams: int = 1) -> list[Stream]:
    """Occupy the one slot of `narrow`, and some more time of it."""
    running = [backend.send("narrow", chat(tokens=LONG_TOKENS), priority=0, tenant=f"busy-{n}") for n in range(streams)]
    await running[0].first(2)
    return running


async def drain(streams: list[Stream]) -> None:
    for stream in streams:
        stream.cancel()


async def test_a_completion_is_a_stream_of_chunks_with_an_end(backend: BackendClient) -> None:
    stream = backend.send("plain", chat("hello", tokens=12, model="alias"))
    chunks = await stream.all()
    assert stream.finished
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)
    assert {c["model"] for c in chunks} == {"alias"}
    assert {c["system_fingerprint"] for c in chunks} == {"plain"}
    assert {len(c["choices"]) for c in chunks} == {1}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(list(c)[-1] == "usage" for c in chunks)


async def test_usage_is_cumulative_and_the_last_is_final(backend: BackendClient) -> None:
    body = chat("count these words, please", tokens=40)
    (counted,) = await backend.send("plain", {**body, "op": "count"}).all()
    chunks = await backend.send("plain", body).all()
    usages = [c["usage"] for c in chunks]
    assert {u["prompt_tokens"] for u in usages} == {counted["prompt_tokens"]}
    completions = [u["completion_tokens"] for u in usages]
    assert completions == sorted(completions)
    assert completions[0] > 0
    assert completions[-1] == completions[-2] == 40
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)


async def test_a_cached_prompt_still_counts_whole(backend: BackendClient) -> None:
    body = chat("the same long question " * 20, tokens=2)
    first = (await backend.send("narrow", body).all())[-1]["usage"]
    again = (await backend.send("narrow", body).all())[-1]["usage"]
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens_details"]["cached_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]


async def test_the_same_seed_gives_the_same_text_and_builds_differ(backend: BackendClient) -> None:
    async def text(build: str) -> str:
        chunks = await backend.send(build, chat("tell me", tokens=24, temperature=0)).all()
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)

    assert await text("plain") == await text("plain")
    chunks = await backend.send("other", chat(tokens=2)).all()
    assert chunks[-1]["system_fingerprint"] == "other"


async def test_joined_chunks_say_the_same(backend: BackendClient) -> None:
    body = chat("tell me all", tokens=100, temperature=0)
    single = await backend.send("plain", body).all()
    joined = await backend.send("calm", body).all()

    def text(chunks: list[dict[str, Any]]) -> str:
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)

    assert len(joined) < len(single) / 2
    assert text(joined) == text(single)
    assert joined[0]["choices"][0]["delta"]["role"] == "assistant"
    assert joined[-1]["choices"][0]["finish_reason"] == "length"
    assert joined[-1]["usage"]["completion_tokens"] == single[-1]["usage"]["completion_tokens"] == 100


async def test_without_max_tokens_the_context_is_the_limit(backend: BackendClient) -> None:
    body = chat("hello")
    del body["max_tokens"]
    last = (await backend.send("plain", body).all())[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["total_tokens"] <= 1024
    last = (await backend.send("plain", chat("hello", tokens=2**40)).all())[-1]
    assert last["usage"]["total_tokens"] <= 1024


async def test_count_tells_prompt_and_context(backend: BackendClient) -> None:
    (short,) = await backend.send("plain", count("hello")).all()
    (longer,) = await backend.send("plain", count("hello hello hello")).all()
    assert set(short) == {"prompt_tokens", "context_tokens"}
    assert short["context_tokens"] == 1024
    assert 0 < short["prompt_tokens"] < longer["prompt_tokens"]


async def test_count_needs_no_slot(backend: BackendClient, triton: RunningTriton) -> None:
    running = await busy(backend, streams=3)
    await backend.send("narrow", count("hello"), priority=9).all()
    assert not any(stream.finished for stream in running)
    await drain(running)
    await idle(backend, triton, "narrow")


async def test_a_prompt_over_the_context_is_refused_before_it_queues(
    backend: BackendClient, triton: RunningTriton
) -> None:
    running = await busy(backend, streams=3)
    code = await refusal(backend.send("narrow", chat("word " * 3000), tenant="verbose").all())
    assert code == "context_length_exceeded"
    assert not any(stream.finished for stream in running)
    await drain(running)
    await idle(backend, triton, "narrow")


async def test_a_bare_prompt_goes_on_without_a_template(backend: BackendClient) -> None:
    body = {"prompt": "count these words", "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    (counted,) = await backend.send("plain", {**body, "op": "count"}).all()
    chunks = await backend.send("plain", body).all()
    assert chunks[-1]["usage"]["prompt_tokens"] == counted["prompt_tokens"]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert chunks[-1]["usage"]["completion_tokens"] <= 5
    assert len(chunks[0]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert await refusal(backend.send("plain", {"prompt": "", "max_tokens": 1}).all()) == "invalid_request"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        {"messages": []},
        chat(op="sing"),
        chat(n=3),
        chat(temperature="hot"),
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
    ],
)
async def test_a_bad_body_is_an_invalid_request(backend: BackendClient, body: bytes | dict[str, object]) -> None:
    assert await refusal(backend.send("plain", body).all()) == "invalid_request"


async def test_private_fields_of_the_engine_do_not_reach_it(backend: BackendClient) -> None:
    body = chat(tokens=3, id_slot=99, n_predict=50, grammar='root ::= "x"', stream=False, cache_prompt=False)
    last = (await backend.send("plain", body).all())[-1]
    assert last["usage"]["completion_tokens"] == 3


async def test_stop_sequences_end_the_stream(backend: BackendClient) -> None:
    whole = await backend.send("plain", chat("tell me", tokens=60, temperature=0)).all()
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in whole)
    word = text[8:10]
    stopped = await backend.send("plain", chat("tell me", tokens=60, temperature=0, stop=[word])).all()
    cut = "".join(c["choices"][0]["delta"].get("content") or "" for c in stopped)
    assert stopped[-1]["choices"][0]["finish_reason"] == "stop"
    assert cut == text[: text.index(word)]


async def test_a_deadline_in_the_queue(backend: BackendClient, triton: RunningTriton) -> None:
    running = await busy(backend, streams=3)
    code = await refusal(backend.send("narrow", chat(), priority=9, timeout_s=0.1).all())
    assert code == "deadline_exceeded"
    assert not any(stream.finished for stream in running)
    await drain(running)
    await idle(backend, triton, "narrow")


async def test_a_deadline_while_generating_keeps_what_was_sent(backend: BackendClient, triton: RunningTriton) -> None:
    await idle(backend, triton, "narrow")
    stream = backend.send("narrow", chat(tokens=LONG_TOKENS), timeout_s=0.15)
    chunks = await stream.first(2)
    assert await refusal(stream.all()) == "deadline_exceeded"
    assert 0 < chunks[-1]["usage"]["completion_tokens"] < LONG_TOKENS
    await idle(backend, triton, "narrow")


async def test_a_full_queue_refuses_at_once_and_no_tenant_can_fill_it(
    backend: BackendClient, triton: RunningTriton
) -> None:
    await idle(backend, triton, "narrow")
    running = await busy(backend)
    waiting = [backend.send("narrow", chat(tokens=LONG_TOKENS), tenant="greedy") for _ in range(2)]
    await arrived(backend, "narrow")
    assert await refusal(backend.send("narrow", chat(), tenant="greedy").all()) == "queue_full"
    waiting += [backend.send("narrow", chat(tokens=LONG_TOKENS), tenant=tenant) for tenant in ("a", "b")]
    await arrived(backend, "narrow")
    assert await refusal(backend.send("narrow", chat(), tenant="c").all()) == "queue_full"
    await drain(running + waiting)
    await idle(backend, triton, "narrow")


async def test_priority_and_turns_decide_who_is_next(backend: BackendClient, triton: RunningTriton) -> None:
    await idle(backend, triton, "narrow")
    running = await busy(backend)
    order: list[str] = []

    async def follow(name: str, stream: Stream) -> None:
        await stream.first(1)
        order.append(name)
        await stream.all()

    tasks = []
    for name, tenant, priority in (("a0", "a", 2), ("a1", "a", 2), ("b0", "b", 2), ("urgent", "c", 1)):
        stream = backend.send("narrow", chat(tokens=20), tenant=tenant, priority=priority)
        tasks.append(asyncio.create_task(follow(name, stream)))
        await arrived(backend, "narrow")
    await running[0].all()
    await asyncio.gather(*tasks)
    assert order == ["urgent", "a0", "b0", "a1"]


async def test_unloading_lets_a_stream_finish_and_loading_brings_the_build_back(backend: BackendClient) -> None:
    stream = backend.send("moved", chat(tokens=300))
    await stream.first(1)
    await backend.unload("moved")
    rest = await stream.all()
    assert rest[-1]["usage"]["completion_tokens"] == 300
    deadline = time.monotonic() + WAIT_S
    while await backend.is_ready("moved"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await backend.load("moved")
    assert (await backend.send("moved", chat(tokens=3)).all())[-1]["usage"]["completion_tokens"] == 3


async def test_a_probe_is_answered_with_and_without_a_free_slot(backend: BackendClient, triton: RunningTriton) -> None:
    before = await idle(backend, triton, "narrow")
    (free,) = await backend.send("narrow", {**chat("ping", tokens=1), "op": "probe"}).all()
    assert set(free) == {"context_tokens", "slots", "slots_busy", "queue_depth", "silence_ms", "idle_ms"}
    assert (free["context_tokens"], free["slots"], free["silence_ms"]) == (1024, 1, 0)
    running = await busy(backend, streams=2)
    (taken,) = await backend.send("narrow", {**chat("ping", tokens=1), "op": "probe"}).all()
    assert taken["slots_busy"] == 1
    assert not any(stream.finished for stream in running)
    await drain(running)
    after = await idle(backend, triton, "narrow")
    assert after["kv_tokens"] == before["kv_tokens"] == 0
    assert after["kv_tokens_max"] == 1024


async def test_the_metrics_of_a_build_are_complete(backend: BackendClient, triton: RunningTriton) -> None:
    await backend.send("plain", chat(tokens=3)).all()
    assert await refusal(backend.send("plain", {"messages": []}).all()) == "invalid_request"
    figures = await idle(backend, triton, "plain")
    gauges = {"queue_depth", "slots", "slots_busy", "kv_tokens", "kv_tokens_max"}
    tokens = {"prompt_tokens_total", "cached_tokens_total", "completion_tokens_total"}
    measured = {"queue_wait_seconds", "ttft_seconds", "time_per_token_seconds"}
    spread = {f"{name}_{part}" for name in measured for part in ("sum", "count")}
    assert figures.keys() >= gauges | tokens | spread | {"requests_total", "cancelled_total"}
    assert figures["errors_total:invalid_request"] >= 1
    assert all(figures[f"{name}_count"] >= 1 for name in measured)


async def test_one_slot_is_always_for_another_tenant(backend: BackendClient, triton: RunningTriton) -> None:
    """`other` has two slots: a tenant that asks for both gets one."""
    await idle(backend, triton, "other")
    greedy = [backend.send("other", chat(tokens=LONG_TOKENS), tenant="greedy") for _ in range(3)]
    await greedy[0].first(1)
    modest = await backend.send("other", chat(tokens=3), tenant="modest").all()
    assert modest[-1]["usage"]["completion_tokens"] == 3
    assert not any(stream.finished for stream in greedy)
    await drain(greedy)
    await idle(backend, triton, "other")


async def test_an_engine_that_falls_silent_ends_its_streams_and_its_process(
    backend: BackendClient, triton: RunningTriton
) -> None:
    await backend.load("stuck")
    stub = triton.stub("stuck")
    healthy = backend.send("stuck", chat("hello", tokens=3), tenant="other")
    assert (await healthy.all())[-1]["usage"]["completion_tokens"] == 3
    stuck = backend.send("stuck", chat("fall silent", tokens=50))
    waiting = backend.send("stuck", chat("hello", tokens=3))
    chunks = await stuck.first(1)
    assert chunks[0]["usage"]["completion_tokens"] > 0
    assert await refusal(stuck.all()) == "engine_error"
    assert await refusal(waiting.all()) == "engine_error"
    await eventually(lambda: not processes.is_alive(stub), "the process lives on")
