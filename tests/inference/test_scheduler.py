"""Intake, queue and workers with an engine that the test holds in its hand."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from services.inference.backend.config import BackendConfig
from services.inference.backend.engine import Cancelled, Chunk, OnChunk, Usage
from services.inference.backend.errors import BackendError
from services.inference.backend.job import Job
from services.inference.backend.scheduler import End, Event, Piece, Reply, Scheduler

TIMEOUT_S = 60
BODY = b'{"messages":[{"role":"user","content":"hi"}]}'


class HeldEngine:
    """Generates one chunk when told; counts a token a byte of the first message."""

    context_tokens = 100
    slots = 1

    def __init__(self) -> None:
        self.started: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self.go = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.counted = 0

    def generate(self, request: Mapping[str, Any], tenant: str, on_chunk: OnChunk, cancelled: Cancelled) -> bool:
        self.started.put(request)
        assert self.go.acquire(timeout=TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        if cancelled():
            return False
        on_chunk(Chunk('{"x":"', "y", '"', Usage(1, 0, 1), True))
        return True

    def compute(self, op: str, request: Mapping[str, Any]) -> bytes:
        return f"{op} of {len(request['input'])}".encode()

    def count(self, request: Mapping[str, Any]) -> int:
        self.counted += 1
        return len(request["messages"][0]["content"])

    def close(self) -> None:
        pass


class Bench:
    """A running scheduler and what it posts."""

    def __init__(self, folder: Path) -> None:
        (folder / "model.gguf").touch()
        parameters = {"context_tokens": "100", "slots": "1", "queue_max": "2", "tenant_queue_max": "2"}
        self.engine = HeldEngine()
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.now_s = 0.0
        config = BackendConfig.parse("test", folder, parameters)
        self.scheduler = Scheduler(self.engine, config, self.events.put, lambda: self.now_s)
        self.scheduler.start()

    def submit(self, body: bytes = BODY, deadline: float | None = None) -> Job:
        job = Job(None, body, 2, "t", 0.0, deadline)
        self.scheduler.submit(job)
        return job

    def event(self) -> Event:
        return self.events.get(timeout=TIMEOUT_S)

    def error(self, job: Job) -> str | None:
        event = self.event()
        assert isinstance(event, End)
        assert event.job is job
        return event.error.code if event.error else None

    def occupy(self) -> Job:
        """A job that the engine has begun."""
        job = self.submit()
        self.engine.started.get(timeout=TIMEOUT_S)
        return job


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for _ in range(10):
        bench.engine.go.release()
    bench.scheduler.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_job_gets_its_chunks_then_its_end(bench: Bench) -> None:
    job = bench.occupy()
    assert bench.scheduler.busy_slots == 1
    bench.engine.go.release()
    piece = bench.event()
    assert isinstance(piece, Piece)
    assert piece.chunk.text == "y"
    assert bench.error(job) is None
    assert bench.scheduler.busy_slots == 0


def test_a_count_is_answered_while_every_slot_is_busy(bench: Bench) -> None:
    bench.occupy()
    bench.submit(b'{"op":"count","messages":[{"role":"user","content":"four"}]}')
    reply = bench.event()
    assert isinstance(reply, Reply)
    assert reply.content == b'{"prompt_tokens":4,"context_tokens":100}'


def test_a_long_prompt_is_counted_and_refused_before_it_queues(bench: Bench) -> None:
    bench.occupy()
    job = bench.submit(b'{"messages":[{"role":"user","content":"%s"}]}' % (b"x" * 100))
    assert bench.error(job) == "context_length_exceeded"
    assert bench.scheduler.queue_depth == 0


def test_a_prompt_that_must_fit_is_not_counted(bench: Bench) -> None:
    bench.occupy()
    assert bench.engine.counted == 0


def test_bad_json_is_refused(bench: Bench) -> None:
    assert bench.error(bench.submit(b"{")) == "invalid_request"


def test_texts_are_computed_in_a_slot_and_answered_whole(bench: Bench) -> None:
    bench.submit(b'{"op":"embed","input":["one","two"]}')
    reply = bench.event()
    assert isinstance(reply, Reply)
    assert reply.content == b"embed of 2"


def test_a_full_queue_is_refused(bench: Bench) -> None:
    bench.occupy()
    bench.submit()
    bench.submit()
    assert bench.error(bench.submit()) == "queue_full"


def test_withdrawing_a_waiting_job_ends_it_at_once(bench: Bench) -> None:
    bench.occupy()
    job = bench.submit()
    until(lambda: bench.scheduler.queue_depth == 1)
    job.stop = "cancelled"
    bench.scheduler.withdraw(job)
    assert bench.error(job) == "cancelled"


def test_withdrawing_a_running_job_ends_it_when_the_engine_has_stopped(bench: Bench) -> None:
    job = bench.occupy()
    job.stop = "cancelled"
    bench.scheduler.withdraw(job)
    assert bench.events.empty()
    bench.engine.go.release()
    assert bench.error(job) == "cancelled"


def test_a_job_that_was_stopped_before_intake_never_queues(bench: Bench) -> None:
    job = Job(None, BODY, 2, "t", 0.0, None, stop="cancelled")
    bench.scheduler.submit(job)
    assert bench.error(job) == "cancelled"
    assert bench.engine.started.empty()


def test_a_completed_job_is_complete_whatever_came_too_late(bench: Bench) -> None:
    job = bench.occupy()
    bench.engine.go.release()
    assert isinstance(bench.event(), Piece)
    job.stop = "deadline_exceeded"
    assert bench.error(job) is None


def test_a_deadline_in_the_queue(bench: Bench) -> None:
    bench.occupy()
    job = bench.submit(deadline=5.0)
    until(lambda: bench.scheduler.queue_depth == 1)
    bench.scheduler.expire()
    assert bench.events.empty()
    bench.now_s = 5.0
    bench.scheduler.expire()
    assert bench.error(job) == "deadline_exceeded"


@pytest.mark.parametrize("failure", [RuntimeError("cuda says /secret/path"), BackendError("engine_error", "No.")])
def test_an_engine_that_fails_costs_one_job_and_no_slot(bench: Bench, failure: Exception) -> None:
    bench.engine.failure = failure
    job = bench.occupy()
    bench.engine.go.release()
    event = bench.event()
    assert isinstance(event, End)
    assert event.error is not None
    assert event.error.code == "engine_error"
    assert "secret" not in event.error.as_json()
    bench.engine.failure = None
    bench.engine.go.release()
    assert bench.submit() is not job
    assert isinstance(bench.event(), Piece)


def test_closing_ends_what_waits_and_finishes_what_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    running = bench.occupy()
    waiting = bench.submit()
    until(lambda: bench.scheduler.queue_depth == 1)
    closing = threading.Thread(target=bench.scheduler.close)
    closing.start()
    assert bench.error(waiting) == "cancelled"
    bench.engine.go.release()
    assert isinstance(bench.event(), Piece)
    assert bench.error(running) is None
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()


def test_only_text_chunks_are_joined() -> None:
    first = Chunk('{"a":"', "one ", '"', Usage(3, 1, 1), True)
    second = Chunk('{"a":"', "two", '"', Usage(3, 1, 2), True)
    last = Chunk('{"finish":1', "", "", Usage(3, 1, 2), False)
    joined = first.join(second)
    assert joined is not None
    assert joined.render() == (
        b'{"a":"one two","usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        b'"prompt_tokens_details":{"cached_tokens":1}}}'
    )
    assert joined.join(last) is None
    assert last.join(first) is None
