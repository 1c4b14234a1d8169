"""The one thread that touches response senders and metrics.

Sending a response, asking whether a caller is gone and setting a metric are each a round trip to the server's
process (0.05 to 0.25 ms, most of it waiting for that process to run). So
- chunks of one stream that pile up while another is being sent leave as one valid chunk (engine.Chunk.join), and a
  build that makes tokens faster than anybody reads them can ask for a least interval between the chunks of a stream;
- a few callers are asked about in each poll, in turn, not every caller at every chunk: with up to CHECKS_RUNNING
  streams and chunks slower than POLL_S a cancel still lands within one chunk;
- metrics are pushed a few times a second, and at once when there is nothing else to do.

A caller that wants no more says so in a request of its own (`op: cancel`): its stream then ends as every other does. To
break the stream instead is noticed too, in the poll, but is dangerous: a cancellation that meets the end of its stream
may crash tritonserver 2.51 (server#8034, repaired in later ones).

It is the watchdog too: an engine that works and says nothing for `engine_silence_s` will not say anything any more. Its
requests get an error, and the process ends, since a thread inside an engine cannot be stopped and an unload would wait
for it; whoever watches the build finds it dead and loads it again.
"""

import heapq
import os
import queue
import threading
import time
from collections.abc import Callable
from operator import attrgetter

import numpy as np
import triton_python_backend_utils as pb_utils

from services.inference.backend.engine import Chunk
from services.inference.backend.errors import BackendError, Code, engine_hung
from services.inference.backend.job import Job, StopReason
from services.inference.backend.metrics import EngineMetrics
from services.inference.backend.scheduler import Cancel, End, Event, Piece, Reply, Scheduler

POLL_S = 0.05  # each wakes this process and the server's, which takes of the engine's time
CHECKS_RUNNING = 16  # asked about in one poll; the others' turn comes in the next
CHECKS_WAITING = 5
METRICS_PUSH_S = 0.2
BATCH_MAX = 256
EXIT_HUNG = 70

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

    def __init__(self, build: str, kv_tokens_max: int, chunk_interval_s: float, engine_silence_s: float) -> None:
        self._events: queue.SimpleQueue[Event | Job | None] = queue.SimpleQueue()
        self._build = build
        self._kv_tokens_max = kv_tokens_max
        self._chunk_interval_s = chunk_interval_s
        self._engine_silence_s = engine_silence_s
        self._jobs: set[Job] = set()
        self._ready: list[Job] = []  # with chunks to send
        self._open = True
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
        assert self._scheduler is not None
        self._metrics.set("slots", self._scheduler.slots)
        self._metrics.set("kv_tokens_max", self._kv_tokens_max)
        self._push_metrics()
        next_poll = next_push = 0.0
        while self._open:
            now = time.monotonic()
            if now >= next_poll:
                self._poll(now)
                next_poll = time.monotonic() + POLL_S
            if now >= next_push:
                self._push_metrics()
                next_push = time.monotonic() + METRICS_PUSH_S
            wake_at = min((job.send_at for job in self._ready), default=next_poll)
            self._take_batch(max(0.0, min(wake_at, next_poll) - now) if self._jobs else None)
            if not self._jobs:
                self._push_metrics()

    def _take_batch(self, timeout_s: float | None) -> None:
        """Handle what was posted, then send the chunks: those of one stream that piled up leave joined."""
        try:
            self._handle(self._events.get(timeout=timeout_s))
            for _ in range(BATCH_MAX):
                self._handle(self._events.get_nowait())
        except queue.Empty:
            pass
        now = time.monotonic()
        due = [job for job in self._ready if job.send_at <= now]
        self._ready = [job for job in self._ready if job.send_at > now]
        for job in due:
            self._flush(job)

    def _handle(self, event: Event | Job | None) -> None:
        if isinstance(event, Piece):
            self._hold(event.job, event.chunk)
        elif isinstance(event, Job):
            event.checked_at = event.received_at
            self._jobs.add(event)
        elif isinstance(event, End):
            self._end(event.job, event.error, None)
        elif isinstance(event, Reply):
            self._end(event.job, None, event)
        elif isinstance(event, Cancel):
            self._cancel(event)
        else:
            self._open = False

    def _hold(self, job: Job, chunk: Chunk) -> None:
        if job.ended:
            return
        job.usage = chunk.usage
        if job.first_token_at is None and chunk.usage.completion_tokens:
            job.first_token_at = time.monotonic()
        if not job.pending:
            self._ready.append(job)
            job.pending.append(chunk)
        elif not job.one_by_one and (joined := job.pending[-1].join(chunk)) is not None:
            job.pending[-1] = joined
        else:
            job.pending.append(chunk)

    def _flush(self, job: Job) -> None:
        pending, job.pending = job.pending, []
        if job.stop is None:
            for chunk in pending:
                self._send(job, _response(chunk.render()))
            job.send_at = time.monotonic() + self._chunk_interval_s

    def _end(self, job: Job, error: BackendError | None, reply: Reply | None) -> None:
        if job.ended:
            return
        if job.pending:
            self._ready.remove(job)
            self._flush(job)
        job.ended = True
        self._jobs.discard(job)
        self._account(job, error)
        if reply is not None:
            self._send(job, _response(reply.content), _FINAL)
        elif error is None:
            self._send(job, None, _FINAL)
        else:
            if error.code == "engine_error":
                pb_utils.Logger.log_error(f"{self._build}: {error.detail}")
            triton_code = getattr(pb_utils.TritonError, _TRITON_CODES[error.code])
            triton_error = pb_utils.TritonError(error.as_json(), triton_code)
            self._send(job, pb_utils.InferenceResponse(error=triton_error), _FINAL)

    def _send(self, job: Job, response: "pb_utils.InferenceResponse | None", flags: int = 0) -> None:
        try:
            if response is None:
                job.sender.send(flags=flags)
            else:
                job.sender.send(response, flags=flags)
        except Exception as error:  # noqa: BLE001 - one broken stream must not stop the others
            pb_utils.Logger.log_error(f"{self._build}: a response was not sent: {error!r}")

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
        silence_s = self._scheduler.silence_s
        if silence_s > self._engine_silence_s:
            self._give_up(silence_s)
        self._scheduler.expire()
        going = [job for job in self._jobs if job.stop is None]
        for job in going:
            if job.deadline is not None and job.deadline <= now:
                self._stop(job, "deadline_exceeded")
        due = [job for job in going if now - job.checked_at >= POLL_S]
        running = (job for job in due if job.started_at is not None)
        waiting = (job for job in due if job.started_at is None)
        for jobs, count in ((running, CHECKS_RUNNING), (waiting, CHECKS_WAITING)):
            for job in heapq.nsmallest(count, jobs, key=attrgetter("checked_at")):
                job.checked_at = now
                if job.stop is None and job.sender.is_cancelled():
                    self._stop(job, "cancelled")

    def _cancel(self, asked: Cancel) -> None:
        """The answer says whether the job was there; one that is on its way may come later."""
        target = next((job for job in self._jobs if job.id == asked.target), None)
        if target is not None and target.stop is None:
            self._stop(target, "cancelled")
        found = b'{"cancelled":true}' if target is not None else b'{"cancelled":false}'
        self._end(asked.job, None, Reply(asked.job, found))

    def _give_up(self, silence_s: float) -> None:
        """Never returns."""
        for job in list(self._jobs):
            self._end(job, engine_hung(silence_s), None)
        self._push_metrics()
        pb_utils.Logger.log_error(f"{self._build}: the engine was silent for {silence_s:.1f} s; its process ends")
        os._exit(EXIT_HUNG)

    def _stop(self, job: Job, reason: StopReason) -> None:
        assert self._scheduler is not None
        job.stop = reason
        self._scheduler.withdraw(job)

    def _push_metrics(self) -> None:
        assert self._scheduler is not None
        self._metrics.set("queue_depth", self._scheduler.queue_depth)
        self._metrics.set("slots_busy", self._scheduler.busy_slots)
        held = sum(job.usage.prompt_tokens + job.usage.completion_tokens for job in self._jobs)
        self._metrics.set("kv_tokens", held)
        self._metrics.push()


def _response(content: bytes) -> "pb_utils.InferenceResponse":
    tensor = pb_utils.Tensor("RESPONSE", np.array([content], dtype=np.object_))
    return pb_utils.InferenceResponse([tensor])
