"""A stack of the bench's own: started in a temporary state directory on a free port, stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.ports import pick_port

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 600


@contextmanager
def running(**variables: str) -> Iterator[dict[str, str]]:
    """`make up` in a place of its own; yields the contents of its dev.env, with its TOLLGATE_STATE.

    `variables` are further settings of the launcher. Raises CalledProcessError if it fails.
    """
    state = tempfile.mkdtemp(prefix="tollgate-bench-")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it stops what it started
    environment = {**os.environ, "TOLLGATE_STATE": state, "TOLLGATE_PORT": str(pick_port()), **variables}
    try:
        _make("up", environment)
        yield {**read(Path(state) / "dev.env"), "TOLLGATE_STATE": state}
    finally:
        _make("down", environment)
        shutil.rmtree(state, ignore_errors=True)


def read(path: Path) -> dict[str, str]:
    """The NAME=value lines of an env file; quotes removed."""
    pairs = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.removeprefix("export ").strip(): value.strip().strip("'\"") for name, _, value in pairs}


def _make(target: str, environment: dict[str, str]) -> None:
    subprocess.run(
        ["make", "--no-print-directory", target],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=sys.stderr,
        timeout=START_TIMEOUT_S,
    )
