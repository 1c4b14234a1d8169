"""The lines that `make up` shows: `[ 3/14] PostgreSQL 18 ........... ready   1.2 s`."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

TITLE_WIDTH = 40


class Progress:
    """Numbered steps on a stream; None is silent."""

    def __init__(self, stream: TextIO | None, total: int, done: int = 0) -> None:
        self._stream = stream
        self._total = total
        self._done = done

    @contextmanager
    def step(self, title: str, outcome: str = "ready", *, since_s: float | None = None) -> Iterator[None]:
        """One step: its title at once on a terminal, its outcome and seconds when it ends (`since_s`: monotonic)."""
        began = time.monotonic() if since_s is None else since_s
        self._done += 1
        head = f"[{self._done:2d}/{self._total:2d}] {title} ".ljust(TITLE_WIDTH, ".")
        if self._stream is not None and self._stream.isatty():
            self._write(f"{head} ")
            head = "\r" + head
        try:
            yield
        except BaseException as error:
            word = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self._write(f"{head} {word:<7} {time.monotonic() - began:5.1f} s\n")
            raise
        self._write(f"{head} {outcome:<7} {time.monotonic() - began:5.1f} s\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            # Nobody reads on (`make up | head`); that is no reason to stop, nor for Python to complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None

    def say(self, text: str) -> None:
        """A line of its own."""
        self._write(f"{text}\n")


def terminal(total: int, done: int = 0) -> Progress:
    """Progress on standard output."""
    return Progress(sys.stdout, total, done)
