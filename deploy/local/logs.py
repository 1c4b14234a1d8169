"""`make logs`: the end of the programs' logs, and what is added to them."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from deploy.local.health import log_tail
from deploy.local.state import Layout

POLL_S = 0.2


def show(layout: Layout, names: Sequence[str], lines: int, out: TextIO) -> None:
    """The last lines of each log, each line with its program's name."""
    width = max(len(name) for name in names)
    for name in names:
        for line in log_tail(layout, name, lines):
            out.write(f"{name.ljust(width)} | {line}\n")
    out.flush()


def follow(layout: Layout, names: Sequence[str], out: TextIO) -> None:
    """Write what is added to the logs from now on, until interrupted."""
    width = max(len(name) for name in names)
    sources = {name: _added(layout.log / f"{name}.log") for name in names}
    while True:
        quiet = True
        for name, source in sources.items():
            for line in next(source):
                out.write(f"{name.ljust(width)} | {line}\n")
                quiet = False
        out.flush()
        if quiet:
            time.sleep(POLL_S)


def _added(path: Path) -> Iterator[list[str]]:
    """On each step the whole lines that were added since the last; a file that was rotated is read from its start."""
    inode, position = _identity(path)
    rest = b""
    while True:
        current, size = _identity(path)
        if current != inode or size < position:
            inode, position, rest = current, 0, b""
        if size > position:
            with path.open("rb") as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
        *lines, rest = rest.split(b"\n")
        yield [line.decode(errors="replace") for line in lines]


def _identity(path: Path) -> tuple[int, int]:
    try:
        entry = path.stat()
    except FileNotFoundError:
        return 0, 0
    return entry.st_ino, entry.st_size
