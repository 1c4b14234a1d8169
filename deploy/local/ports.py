"""Which ports of 127.0.0.1 a stack may have."""

import fcntl
import os
import secrets
import socket
import tempfile
from pathlib import Path

from deploy.local.errors import LaunchError

# Below the kernel's default range for outgoing connections (32768 and up), so that no client socket takes one.
PORT_RANGE = range(20_000, 32_000)
PORT_ATTEMPTS = 200


class _Reservations:
    """Ports that a launcher has picked and that nobody listens on yet.

    Without them two stacks that start at the same time (the workers of one test run) may pick the same port, or one may
    pick the port of the other's program that is being restarted. A reservation is a lock on one byte of a file, as far
    in as the port's number: the kernel ends it with the process that took it.
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._file = -1

    def take(self, port: int) -> bool:
        """Whether the port is now this process's; False where it was already, or is another's."""
        if port in self._taken:
            return False
        if self._file < 0:
            path = Path(tempfile.gettempdir()) / f"tollgate-ports-{os.getuid()}.lock"
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            return False
        self._taken.add(port)
        return True


_RESERVATIONS = _Reservations()


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without it a port whose last connections are in TIME_WAIT would look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def pick_port(avoid: frozenset[int] = frozenset()) -> int:
    """A free port outside `avoid`, reserved by this process. Raises LaunchError when chance finds none."""
    for _ in range(PORT_ATTEMPTS):
        port = PORT_RANGE.start + secrets.randbelow(len(PORT_RANGE))
        if port not in avoid and port_is_free(port) and _RESERVATIONS.take(port):
            return port
    raise LaunchError(f"No free port between {PORT_RANGE.start} and {PORT_RANGE.stop} was found.")
