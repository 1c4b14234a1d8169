"""Fixtures around a real Unleash 8 on the session's PostgreSQL; a plugin, so that one server serves every folder.

`unleash`   session; the server (about 5 s, once).     `console`  session; an operator's hand on it.
`line`      a TCP relay to it that a test can cut.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from deploy.local import processes
from deploy.local.errors import NotReady
from deploy.local.ports import pick_port
from deploy.local.programs import Program
from deploy.local.unleash import Unleash
from tests.conftest import Components
from tests.deploy.unleash.console import Console
from tests.deploy.unleash.line import Line


@dataclass(frozen=True)
class UnleashServer:
    """Where it is. `client_token` is for the environment `development`."""

    url: str
    admin_token: str = field(repr=False)
    client_token: str = field(repr=False)


@pytest.fixture(scope="session")
def unleash(components: Components) -> Iterator[UnleashServer]:
    postgres = components.postgres
    server = Unleash(postgres.layout, postgres.secrets, pick_port(frozenset()), postgres)
    program = server.program()
    with (postgres.layout.log / "unleash-tests.log").open("wb") as log:
        process = subprocess.Popen(
            program.command,
            cwd=program.directory,
            # The marker lets the next session find it, should this one be killed.
            env={**program.environment, **processes.marker(postgres.layout.stack_id)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_healthy(process, program)
        secrets = postgres.secrets
        yield UnleashServer(server.url, secrets["unleash_admin_token"], secrets["unleash_client_token"])
    finally:
        # Its database goes with the session: nothing to end in good order.
        process.kill()
        process.wait()


def _wait_healthy(process: subprocess.Popen[bytes], program: Program) -> None:
    deadline = time.monotonic() + program.deadline_s
    while True:
        assert process.poll() is None, f"Unleash ended: {program.remedy}"
        try:
            return program.health()
        except NotReady:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="session")
def console(unleash: UnleashServer) -> Iterator[Console]:
    console = Console(unleash.url, unleash.admin_token)
    yield console
    console.close()


@pytest.fixture
async def line(unleash: UnleashServer) -> AsyncIterator[Line]:
    line = Line(unleash.url)
    await line.mend()
    yield line
    await line.cut()
