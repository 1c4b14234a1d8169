"""The one thread that touches response senders and metrics.

It sends what the scheduler posts, in order, and between sends asks Triton which callers are gone. Asking
and sending are round trips to the server's process, so a caller is asked about at most once in
`CANCEL_POLL_S`, not once a chunk: with chunks slower than that a cancel still lands within one chunk.
"""

import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import triton_python_backend_utils as pb_utils

from services.inference.backend.errors import BackendError, Code
from services.inference.backend.job import Job
from services.inference.backend.metrics import EngineMetrics
from services.inference.backend.scheduler import Chunk, End, Event, Reply, Scheduler

CANCEL_POLL_S = 0.01
METRICS_PUSH_S = 0.5

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_TRITON_CODES: dict[Code, str] = {  # names: Triton fills its module in after this one was imported
    "invalid_request": "INVALID_ARG",
    "context_length_exceeded": "INVALID_ARG",
    "queue_full": "UNAVAILABLE",
    "deadline_exceeded": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "engine_error": "INTERNAL",
}


class Dispatcher:
    """Start it before the scheduler, close it after."""

    def __init__(self, build: str, slots: int) -> None:
        self._events: queue.SimpleQueue[Event | Job | None] = queue.SimpleQueue()
        self._build = build
        self._slots = slots
        self._jobs: set[Job] = set()
        self._scheduler: Scheduler | None = None
        self._thread = threading.Thread(target=self._run, name="dispatcher")

    @property
    def post(self) -> Callable[[Event], None]:
        """Hand an event over; never blocks; any thread."""
        return self._events.put

    def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._thread.start()

    def accept(self, job: Job) -> None:
        """Watch a new job for cancellation and deadline. Before the scheduler gets it."""
        self._events.put(job)

    def close(self) -> None:
        """Send what was posted, then stop. The scheduler is closed already."""
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._metrics = EngineMetrics(self._build)
        self._metrics.set("slots", self._slots)
        next_poll = next_push = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_poll:
                self._poll(now)
                next_poll = time.monotonic() + CANCEL_POLL_S
            if now >= next_push:
                self._push_metrics()
                next_push = time.monotonic() + METRICS_PUSH_S
            try:
                event = self._events.get(timeout=max(0.0, (next_poll if self._jobs else next_push) - now))
            except queue.Empty:
                continue
            if event is None:
                break
            try:
                self._handle(event)
            except Exception as error:  # noqa: BLE001 - one broken stream must not stop the others
                pb_utils.Logger.log_error(f"{self._build}: dispatcher: {error!r}")
        self._push_metrics()

    def _handle(self, event: Event | Job) -> None:
        if isinstance(event, Chunk):
            self._chunk(event)
        elif isinstance(event, Job):
            self._jobs.add(event)
        elif isinstance(event, End):
            self._end(event.job, event.error)
        else:
            self._end(event.job, None, event)

    def _chunk(self, chunk: Chunk) -> None:
        job = chunk.job
        if job.ended:
            return
        job.usage = chunk.usage
        if job.first_token_at is None and chunk.usage.completion_tokens:
            job.first_token_at = time.monotonic()
        if job.stop is None:
            job.sender.send(_response(chunk.content))

    def _end(self, job: Job, error: BackendError | None, reply: Reply | None = None) -> None:
        if job.ended:
            return
        job.ended = True
        self._jobs.discard(job)
        self._account(job, error)
        if reply is not None:
            job.sender.send(_response(reply.content), flags=_FINAL)
        elif error is None:
            job.sender.send(flags=_FINAL)
        else:
            if error.code == "engine_error":
                pb_utils.Logger.log_error(f"{self._build}: {error.detail}")
            triton_code = getattr(pb_utils.TritonError, _TRITON_CODES[error.code])
            triton_error = pb_utils.TritonError(error.as_json(), triton_code)
            job.sender.send(pb_utils.InferenceResponse(error=triton_error), flags=_FINAL)

    def _account(self, job: Job, error: BackendError | None) -> None:
        metrics, usage = self._metrics, job.usage
        metrics.add("requests_total")
        metrics.add("prompt_tokens_total", usage.prompt_tokens)
        metrics.add("cached_tokens_total", usage.cached_tokens)
        metrics.add("completion_tokens_total", usage.completion_tokens)
        if error is not None and error.code == "cancelled":
            metrics.add("cancelled_total")
        elif error is not None:
            metrics.error(error.code)
        if job.started_at is not None:
            metrics.observe("queue_wait_seconds", job.started_at - job.received_at)
        if job.first_token_at is not None:
            metrics.observe("ttft_seconds", job.first_token_at - job.received_at)
            if usage.completion_tokens > 1:
                generating_s = time.monotonic() - job.first_token_at
                metrics.observe("time_per_token_seconds", generating_s / (usage.completion_tokens - 1))

    def _poll(self, now: float) -> None:
        """Stop the jobs whose caller is gone or whose deadline has passed."""
        assert self._scheduler is not None
        self._scheduler.expire()
        for job in self._jobs:
            if job.stop is not None:
                continue
            if job.deadline is not None and job.deadline <= now:
                job.stop = "deadline_exceeded"
            elif job.sender.is_cancelled():
                job.stop = "cancelled"
            else:
                continue
            self._scheduler.withdraw(job)

    def _push_metrics(self) -> None:
        assert self._scheduler is not None
        self._metrics.set("queue_depth", self._scheduler.queue_depth)
        self._metrics.set("slots_busy", self._scheduler.busy_slots)
        self._metrics.push()


def _response(content: bytes) -> "pb_utils.InferenceResponse":
    tensor = pb_utils.Tensor("RESPONSE", np.array([content], dtype=np.object_))
    return pb_utils.InferenceResponse([tensor])
