"""argon2id in a bounded pool of threads.

A hash costs tens of milliseconds of one core and its memory, on purpose. The pool keeps sign-ins from starving the
rest of the process: `threads` at once, `queue_max` waiting, and beyond that an honest 503, given before anything is
looked up. The threads yield the processor to everybody else (`nice`, on Linux, where threads have one of their own).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import argon2
from prometheus_client import Gauge

from services.auth.domain.fields import normalised_password
from services.auth.errors import PasswordQueueFull

RETRY_AFTER_S = 1
PHC_PREFIX = "$argon2"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a password is right, and whether its hash was made with other parameters than today's."""

    correct: bool
    outdated: bool = False


class Passwords:
    """Hashes and verifies. `close` ends the threads."""

    def __init__(self, hasher: argon2.PasswordHasher, *, threads: int, queue_max: int, nice: int, jobs: Gauge) -> None:
        self._hasher = hasher
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="argon2", initializer=_yield_to_others, initargs=(nice,)
        )
        self._signing_in = 0
        self._capacity = threads + queue_max
        self._jobs = jobs
        self._pending = 0
        self._lock = threading.Lock()
        # For users that do not exist: their sign-in must cost what everybody's costs.
        self._decoy = hasher.hash(secrets.token_urlsafe(32))

    async def hash(self, password: str) -> str:
        """The PHC string of a new password. Raises PasswordQueueFull."""
        return await self._run(lambda: self._hasher.hash(normalised_password(password)))

    async def verify(self, stored: str | None, password: str) -> Verdict:
        """Check a password against a PHC string, or, with None, do the same work in vain. Raises PasswordQueueFull."""
        has_password = stored is not None and stored.startswith(PHC_PREFIX)  # who signs in elsewhere has none
        correct = await self._run(lambda: self._matches(stored if stored and has_password else self._decoy, password))
        if stored is None or not has_password or not correct:
            return Verdict(correct=False)
        return Verdict(correct=True, outdated=self._hasher.check_needs_rehash(stored))

    @contextmanager
    def sign_in(self) -> Iterator[None]:
        """A place among those who are being signed in, as many as can wait for it. Raises PasswordQueueFull."""
        if self._signing_in >= self._capacity:
            raise PasswordQueueFull(retry_after_s=RETRY_AFTER_S)
        self._signing_in += 1
        try:
            yield
        finally:
            self._signing_in -= 1

    def close(self) -> None:
        """Let running hashes end and refuse the waiting ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, normalised_password(password))
        except argon2.exceptions.VerifyMismatchError:
            return False

    async def _run(self, job: Callable[[], T]) -> T:
        with self._lock:
            if self._pending >= self._capacity:
                raise PasswordQueueFull(retry_after_s=RETRY_AFTER_S)
            self._pending += 1
        self._jobs.inc()
        future = self._pool.submit(job)
        # Counted down where the thread is done with it, not where the request is: a request may be cancelled.
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def _done(self, _future: Future[T]) -> None:
        with self._lock:
            self._pending -= 1
        self._jobs.dec()


def _yield_to_others(nice: int) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
