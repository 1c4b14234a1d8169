"""Clients that others have written find what they expect: langchain-openai and litellm, each a program of its own.

They bring their own versions of packages that the services use, so they live in `.venv-clients`, made here when it is
missing, from a lock with hashes. That takes minutes; hence `make torture` only.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.journeys.conftest import unlimit
from tests.journeys.people import User
from tests.running_stack import RunningStack

pytestmark = [pytest.mark.torture, pytest.mark.timeout(2_400)]

PROGRAMS = Path(__file__).parent / "foreign"
LOCK = ROOT / "requirements" / "clients.txt"
ENVIRONMENT = ROOT / ".venv-clients"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALL_TIMEOUT_S = 1_800
CLIENT_TIMEOUT_S = 300


def run(command: Sequence[str | Path], timeout_s: float, **variables: str) -> str:
    """What it prints. Fails with its last words."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4_000:]
    return done.stdout


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the clients' environment, which is as its lock says."""
    stamp, locked = ENVIRONMENT / "tollgate.lock", hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != locked:
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        run((sys.executable, "-m", "venv", "--clear", ENVIRONMENT), INSTALL_TIMEOUT_S)
        install = (PYTHON, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", LOCK)
        run(install, INSTALL_TIMEOUT_S, **passed_on)
        stamp.write_text(locked)
    return PYTHON


@pytest.mark.parametrize("client", ["langchain_client", "litellm_client"])
def test_a_foreign_client_finds_what_it_expects(stack: RunningStack, user: User, python: Path, client: str) -> None:
    """Chat, a stream, tools, structured output, embeddings, errors by their own classes."""
    unlimit(stack, user)
    said = run(
        (python, PROGRAMS / f"{client}.py"),
        CLIENT_TIMEOUT_S,
        TOLLGATE_URL=user.url,
        TOLLGATE_API_KEY=user.key,
        LITELLM_LOCAL_MODEL_COST_MAP="True",  # it would fetch its list of prices
        LANGSMITH_TRACING="false",
    )
    assert said == "ok\n"
