"""Intake, queue and workers: everything between `execute` and the dispatcher, free of Triton.

A job ends exactly once, by one event: Reply (every op but chat), or End after any number of Piece. One that cancels
another is the dispatcher's to answer. Whoever has the
job posts it: intake when it refuses, the queue's owner when the job is cancelled or late while it waits, a
worker otherwise.

Intake runs in the caller's thread and never blocks; only what has to be counted goes through the counting
thread, which waits for the engine's tokenizer.

Whether the engine lives is seen from its work: `silence_s` is how long an engine that has something to do has said
nothing, neither a chunk nor a prefill batch. A probe is answered at once while the engine works, and otherwise makes
it generate one token.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from services.inference.backend import errors, request
from services.inference.backend.config import BackendConfig
from services.inference.backend.engine import Chunk, Engine
from services.inference.backend.errors import BackendError
from services.inference.backend.job import Job
from services.inference.backend.queue import FairQueue, QueueClosed, QueueFull


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a stream."""

    job: Job
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole answer of a job that is no stream."""

    job: Job
    content: bytes


@dataclass(frozen=True, slots=True)
class End:
    """A stream's end: complete, or failed with `error`."""

    job: Job
    error: BackendError | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """A job that asks for the end of the one whose id is `target`."""

    job: Job
    target: str


Event = Piece | Reply | End | Cancel


class Scheduler:
    """Owns the intake thread and one worker thread a slot."""

    def __init__(
        self,
        engine: Engine,
        config: BackendConfig,
        post: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        """`post` hands an event to the dispatcher; it must not block."""
        self._engine = engine
        self._config = config
        self._post = post
        self._clock = clock
        self._uncounted: queue.Queue[Job | None] = queue.Queue(config.intake_max)
        self._queue: FairQueue[Job] = FairQueue(
            config.queue_max, config.tenant_queue_max, config.tenant_slots_max, clock
        )
        self._threads = [threading.Thread(target=self._count, name="count")]
        self._threads += [threading.Thread(target=self._work, name=f"slot-{number}") for number in range(engine.slots)]
        self.busy_slots = 0
        self._busy_lock = threading.Lock()
        self._heard_at = 0.0
        self._used_at = clock()

    @property
    def silence_s(self) -> float:
        """Since the engine last said anything; 0 while it has nothing to do."""
        return self._clock() - self._heard_at if self.busy_slots else 0.0

    @property
    def slots(self) -> int:
        """Requests that are generated at the same time."""
        return self._engine.slots

    @property
    def queue_depth(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Take a job over: it is refused, queued, or waits to be counted. Never blocks."""
        self._or_end(self._take_in, job)

    def withdraw(self, job: Job) -> None:
        """End a stopped job now if it still waits; otherwise its thread sees `job.stop` and ends it."""
        if self._queue.remove(job):
            self._post(End(job, job.stop_error()))

    def expire(self) -> None:
        """End the waiting jobs whose deadline has passed."""
        for job in self._queue.expire():
            self._post(End(job, errors.deadline_exceeded()))

    def close(self) -> None:
        """End what waits, finish what runs, join every thread."""
        self._uncounted.put(None)
        for job in self._queue.close():
            self._post(End(job, errors.cancelled()))
        for thread in self._threads:
            thread.join()

    def _or_end(self, step: Callable[[Job], None], job: Job) -> None:
        try:
            step(job)
        except BackendError as error:
            self._post(End(job, error))
        except Exception as error:  # noqa: BLE001 - one bad request must not end a thread
            self._post(End(job, errors.engine_failed(f"intake: {error!r}")))

    def _take_in(self, job: Job) -> None:
        size = len(job.body)
        job.op, job.request = request.parse(job.body, self._config.request_bytes_max)
        job.body = b""
        if job.op == "cancel":
            self._post(Cancel(job, job.request["request"]))
            return
        if job.op == "status" or (job.op == "probe" and self.busy_slots):
            self._post(Reply(job, self._status()))
            return
        if job.tenant != request.CANARY_TENANT:
            self._used_at = self._clock()
        # A token takes a byte at least, and half the context is room for any template: short prompts fit.
        if job.op != "count" and size <= self._engine.context_tokens // 2:
            self._enqueue(job)
            return
        try:
            self._uncounted.put_nowait(job)
        except queue.Full:
            raise errors.queue_full() from None

    def _count(self) -> None:
        while (job := self._uncounted.get()) is not None:
            self._or_end(self._count_one, job)

    def _count_one(self, job: Job) -> None:
        if job.is_stopped():
            raise job.stop_error()
        prompt_tokens = self._engine.count(job.request)
        context_tokens = self._engine.context_tokens
        if job.op == "count":
            counted = b'{"prompt_tokens":%d,"context_tokens":%d}' % (prompt_tokens, context_tokens)
            self._post(Reply(job, counted))
        elif prompt_tokens >= context_tokens:
            raise errors.context_length_exceeded(prompt_tokens, context_tokens)
        else:
            self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        try:
            self._queue.put(job, priority=job.priority, tenant=job.tenant, deadline=job.deadline)
        except QueueFull:
            raise errors.queue_full() from None
        except QueueClosed:
            raise errors.cancelled() from None
        if job.is_stopped():  # stopped while it was on its way into the queue: nobody else would notice
            self.withdraw(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._busy_lock:
                if not self.busy_slots:
                    self._heard_at = self._clock()
                self.busy_slots += 1
            error, answer = self._serve(job)
            with self._busy_lock:
                self.busy_slots -= 1
            self._queue.done(job.tenant)
            if job.tenant != request.CANARY_TENANT:
                self._used_at = self._clock()
            self._post(End(job, error) if answer is None else Reply(job, answer))

    def _serve(self, job: Job) -> tuple[BackendError | None, bytes | None]:
        """The error that ends a job, if any; the whole answer of one that is no stream."""
        if job.op in ("embed", "rerank"):
            return self._compute(job)
        error = self._generate(job)
        return error, self._status() if job.op == "probe" and error is None else None

    def _compute(self, job: Job) -> tuple[BackendError | None, bytes | None]:
        job.started_at = self._clock()
        if job.is_stopped():
            return job.stop_error(), None
        try:
            return None, self._engine.compute(job.op, job.request)
        except BackendError as error:
            return error, None
        except Exception as error:  # noqa: BLE001 - one bad request must not end the slot
            return errors.engine_failed(f"worker: {error!r}"), None

    def _status(self) -> bytes:
        """`idle_ms`: since the build last did something for anybody but its canary."""
        idle_s = 0.0 if self.busy_slots or self.queue_depth else self._clock() - self._used_at
        return (b'{"context_tokens":%d,"slots":%d,"slots_busy":%d,"queue_depth":%d,"silence_ms":%d,"idle_ms":%d}') % (
            self._engine.context_tokens,
            self._engine.slots,
            self.busy_slots,
            self.queue_depth,
            int(self.silence_s * 1000),
            int(idle_s * 1000),
        )

    def _generate(self, job: Job) -> BackendError | None:
        """Run the engine for one job; the error that ends it, if any."""
        job.started_at = self._clock()
        if job.is_stopped():
            return job.stop_error()

        def on_chunk(chunk: Chunk) -> None:
            if job.op == "chat":
                self._post(Piece(job, chunk))

        def is_stopped() -> bool:
            self._heard_at = self._clock()
            return job.is_stopped()

        try:
            complete = self._engine.generate(job.request, job.tenant, on_chunk, is_stopped)
        except BackendError as error:
            return error
        except Exception as error:  # noqa: BLE001 - one bad request must not end the slot
            return errors.engine_failed(f"worker: {error!r}")
        return None if complete else job.stop_error()
