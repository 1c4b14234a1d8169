"""What is in a new stack before the first request: schemas, prices, flags, a demo user and an administrator."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from deploy.local import processes
from deploy.local.errors import LaunchError
from deploy.local.health import LOG_TAIL_LINES
from deploy.local.services import Services
from deploy.local.state import Layout, write_private
from deploy.local.supervisor import base_environment

COMMAND_TIMEOUT_S = 120.0
DEMO_USER = "demo"
ADMIN_USER = "admin"
# An administrator's scripts are not customers: ten times what a key may by default.
ADMIN_LIMITS = {"minute": 600, "hour": 10_000, "day": 100_000}


@dataclass(frozen=True, slots=True)
class Keys:
    """The two keys that a new stack comes with, shown to whoever started it."""

    api_key: str
    admin_token: str


class Seed:
    """Runs the services' own commands, each once for the same inputs: a stamp in the state remembers them."""

    def __init__(self, layout: Layout, services: Services) -> None:
        self._layout = layout
        self._services = services
        self._stamps = layout.state / "seeded.json"
        self._keys = layout.state / "keys.json"

    def forget(self) -> None:
        """The database is new: everything has to be done again."""
        self._stamps.unlink(missing_ok=True)
        self._keys.unlink(missing_ok=True)

    def migrate(self) -> None:
        """Bring every schema to the head of its migrations. Raises LaunchError with the command's last lines."""
        owners = migrated_services(self._layout.root)
        sources = [path for owner in owners for path in _files(self._layout.root / "services" / owner / "migrations")]

        def run() -> None:
            with ThreadPoolExecutor(len(owners)) as pool:
                for future in [pool.submit(self._service, owner, "migrate") for owner in owners]:
                    future.result()

        if owners:
            self._once("migrations", sources, run)

    def prices(self) -> None:
        """Publish the list prices."""
        source = self._layout.prices
        self._once("prices", [source], lambda: self._service("billing", "prices", "--file", str(source)))

    def flags(self) -> None:
        """Make the rollout flags in Unleash."""
        catalogue = self._layout.models / "catalogue.toml"
        sources = [self._layout.root / "deploy" / "unleash" / "seed.py", catalogue]
        seed = ("deploy.unleash.seed", "--catalogue", str(catalogue))
        unleash = self._services.unleash
        environment = {"UNLEASH_URL": unleash.url, "UNLEASH_ADMIN_TOKEN": unleash.secrets["unleash_admin_token"]}
        self._once("flags", sources, lambda: self._run(seed, environment))

    def keys(self) -> Keys:
        """The demo user's key and the administrator's token; made on the first call."""
        kept = self.kept_keys()
        if kept is not None:
            return kept
        keys = Keys(
            api_key=self._bootstrap(DEMO_USER, "user", "demo_password"),
            admin_token=self._bootstrap(ADMIN_USER, "admin", "admin_password", ADMIN_LIMITS),
        )
        write_private(self._keys, json.dumps({"api_key": keys.api_key, "admin_token": keys.admin_token}))
        return keys

    def kept_keys(self) -> Keys | None:
        """The keys of an earlier start, if there was one."""
        return Keys(**json.loads(self._keys.read_text())) if self._keys.exists() else None

    def _bootstrap(self, user: str, role: str, password: str, limits: Mapping[str, int] = MappingProxyType({})) -> str:
        output = self._service(
            *("auth", "bootstrap", "--username", user, "--email", f"{user}@example.com"),
            *("--role", role, "--key-name", user),
            *(f"--limit={name}={number}" for name, number in limits.items()),
            extra={"TOLLGATE_BOOTSTRAP_PASSWORD": self._services.secrets[password]},
        )
        try:
            return str(json.loads(output.strip().splitlines()[-1])["key"])
        except (IndexError, KeyError, ValueError):
            raise LaunchError("`services.auth bootstrap` printed no key.") from None

    def _service(self, service: str, *arguments: str, extra: Mapping[str, str] | None = None) -> str:
        environment = self._services.administration(service) | dict(extra or {})
        return self._run((f"services.{service}", *arguments), environment)

    def _run(self, module: Sequence[str], environment: Mapping[str, str]) -> str:
        return run_module(self._layout, module, environment)

    def _once(self, name: str, sources: Sequence[Path], run: Callable[[], object]) -> None:
        done: dict[str, str] = json.loads(self._stamps.read_text()) if self._stamps.exists() else {}
        fingerprint = _fingerprint(sources)
        if done.get(name) == fingerprint:
            return
        run()
        write_private(self._stamps, json.dumps(done | {name: fingerprint}, indent=1))


def migrated_services(root: Path) -> tuple[str, ...]:
    """The services that own tables: those with an Alembic environment."""
    return tuple(sorted(path.parents[1].name for path in (root / "services").glob("*/migrations/env.py")))


def run_module(layout: Layout, module: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run `python -m …` in the services' environment; its standard output. Raises LaunchError with its last lines."""
    name = " ".join(module[:2])
    try:
        result = subprocess.run(
            (str(layout.python), "-m", *module),
            env={**base_environment(), **processes.marker(layout.stack_id), **environment},
            cwd=layout.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"`{name}` did not end within {COMMAND_TIMEOUT_S:.0f} s.") from None
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).splitlines()[-LOG_TAIL_LINES:]
        raise LaunchError(f"`{name}` failed ({result.returncode}):\n" + "\n".join(f"    {line}" for line in lines))
    return result.stdout


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.suffix in {".py", ".sql", ".ini"})


def _fingerprint(sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(os.fsencode(source.name) + b"\0" + source.read_bytes())
    return digest.hexdigest()
