"""Ports: what one launcher has picked no other picks, before anybody listens there."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import ports
from deploy.local.errors import LaunchError

TIMEOUT_S = 120
ROOT = Path(__file__).parents[3]
ALL = 4
PICK = f"""
from deploy.local import ports
ports.PORT_RANGE = range(int(__import__("sys").argv[1]), int(__import__("sys").argv[1]) + {ALL})
print(ports.pick_port(frozenset()), flush=True)
input()
"""


def launcher(first: int) -> subprocess.Popen[str]:
    command = (sys.executable, "-c", PICK, str(first))
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_launchers_pick_different_ports_until_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # Above the range that other tests pick from, below the kernel's range for outgoing connections.
    first = ports.PORT_RANGE.stop + 500
    monkeypatch.setattr(ports, "PORT_RANGE", range(first, first + ALL))
    others = [launcher(first) for _ in range(ALL - 1)]
    try:
        theirs = {int(other.stdout.readline()) for other in others if other.stdout}
        mine = ports.pick_port(frozenset())
        assert theirs | {mine} == set(ports.PORT_RANGE)
        with pytest.raises(LaunchError, match="No free port"):
            ports.pick_port(frozenset())
    finally:
        for other in others:
            other.communicate("\n", timeout=TIMEOUT_S)
    assert {ports.pick_port(frozenset()) for _ in others} == theirs
