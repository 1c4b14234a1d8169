"""Fixtures that every test may ask for. Nothing is started until a test does; nothing is mocked.

`components`      session; PostgreSQL 18 and Valkey 9 on free ports, with passwords (about 3 s, once).
                  `.postgres_url`: owner of database `tollgate`, may create databases and roles (no superuser);
                  `.redis_url`: Valkey, which tests share: use keys of your own, or flush in your fixture.
`fresh_database`  module; a factory: `url = fresh_database("billing")` makes an empty database and answers with its
                  owner's URL; `fresh_database("billing", migrate=f)` calls `f(url)` once per session on a template and
                  then clones that (quick). The databases are dropped after the module. Roles belong to the whole
                  cluster: a service's role must have the same password in every test; `role_url` gives such a URL.
A migration that needs several arguments is bound with functools.partial; `migrate` runs outside any event loop.
"""

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import structlog
from xdist.scheduler import LoadScopeScheduling

from deploy.local import processes
from deploy.local.ports import pick_port
from deploy.local.postgres import OWNER, Postgres
from deploy.local.progress import Progress
from deploy.local.shutdown import stop_everything
from deploy.local.stack import STEPS, Stack
from deploy.local.state import Layout
from tests.running_stack import RunningStack
from tests.secrets_seen import SecretsSeen, watching

ROOT = Path(__file__).parents[1]
STATE_PREFIX = "tollgate-test-"
STACK_TIMEOUT_S = 600  # the first test of a session waits for the whole stack, on a busy machine for minutes
WITH_STACK = ("tests/journeys/", "tests/deploy/local/test_whole_stack.py")

Migrate = Callable[[str], object]


def pytest_configure() -> None:
    """SIGTERM ends a session as Ctrl-C does: what was started is stopped. And a crash is logged plainly: structlog's
    default shows every local variable, which takes seconds, on a busy machine a minute, and stops the event loop.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure([*structlog.get_config()["processors"][:-1], plain])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Time for the whole stack's users; refuse one where the workers would start a second stack."""
    for item in items:
        if "stack" not in getattr(item, "fixturenames", ()):
            continue
        if not item.nodeid.startswith(WITH_STACK):
            raise pytest.UsageError(f"{item.nodeid} uses the fixture stack: name its module in {__name__}.WITH_STACK")
        own = item.get_closest_marker("timeout")
        if own is None or own.args[0] < STACK_TIMEOUT_S:
            item.add_marker(pytest.mark.timeout(STACK_TIMEOUT_S), append=False)


class ByModule(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """With several workers a module stays on one, and whatever uses the stack on one as well."""

    def _split_scope(self, nodeid: str) -> str:
        return "stack" if nodeid.startswith(WITH_STACK) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByModule:
    return ByModule(config, log)


@dataclass(frozen=True)
class Components:
    """PostgreSQL and Valkey of this test session."""

    postgres: Postgres
    postgres_url: str
    redis_url: str
    _templates: dict[str, str] = field(default_factory=dict)

    def create_database(self, name: str, template: str | None = None) -> str:
        """A new database with a unique name that begins with `name`; its owner's URL."""
        database = f"{name}_{secrets.token_hex(4)}"
        source = f" TEMPLATE {template}" if template else ""
        self.postgres.execute(f"CREATE DATABASE {database} OWNER {OWNER}{source}")
        return with_database(self.postgres_url, database)

    def drop_database(self, url: str) -> None:
        """Drop it with the connections that tests left open."""
        self.postgres.execute(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")

    def migrated_template(self, name: str, migrate: Migrate) -> str:
        """The name of a database that `migrate` was run on, once per session for each function."""
        key = f"{name}:{getattr(migrate, '__module__', '')}.{getattr(migrate, '__qualname__', repr(migrate))}"
        if key not in self._templates:
            url = self.create_database(f"template_{name}")
            migrate(url)
            database = urlsplit(url).path[1:]
            # PostgreSQL refuses to clone a database that somebody is connected to.
            self.postgres.execute(
                f"ALTER DATABASE {database} ALLOW_CONNECTIONS false;"
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
            )
            self._templates[key] = database
        return self._templates[key]


class FreshDatabase:
    """The factory behind the fixture `fresh_database`."""

    def __init__(self, components: Components) -> None:
        self._components = components
        self._urls: list[str] = []

    def __call__(self, name: str, migrate: Migrate | None = None) -> str:
        """The owner's URL of a database of this module's own, empty or a clone of what `migrate` made."""
        template = self._components.migrated_template(name, migrate) if migrate else None
        url = self._components.create_database(name, template)
        self._urls.append(url)
        return url

    def drop_all(self) -> None:
        """Drop what this factory made."""
        for url in self._urls:
            self._components.drop_database(url)


def with_database(url: str, database: str) -> str:
    """The same server and role, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


def role_url(url: str, role: str) -> str:
    """The URL of another role on the same database; the same password in every test of a session."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{role}:{parts.password}@{parts.hostname}:{parts.port}"))


def _stop_abandoned() -> None:
    """Stop the stacks of test sessions that were killed before they could."""
    for state in Path(tempfile.gettempdir()).glob(f"{STATE_PREFIX}*"):
        with suppress(FileNotFoundError, ValueError):  # another worker was here first, or is just beginning
            owner = state / "owner.pid"
            if state.stat().st_uid != os.geteuid() or processes.is_alive(int(owner.read_text())):
                continue
            for directory in (state, *(path for path in state.iterdir() if path.is_dir())):
                stop_everything(Layout(ROOT, directory))
            shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def state_directory() -> Iterator[Path]:
    """A short path that PostgreSQL's own user can reach; removed at the end."""
    _stop_abandoned()
    state = Path(tempfile.mkdtemp(prefix=STATE_PREFIX))
    (state / "owner.pid").write_text(str(os.getpid()))
    yield state
    shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def components(state_directory: Path) -> Iterator[Components]:
    """PostgreSQL and Valkey; see the module's docstring."""
    stores = Stack(Layout(ROOT, state_directory / "data-stores"), 1, {})
    try:
        stores.start_data_stores()
        yield Components(stores.postgres, stores.postgres.url(), stores.valkey.url)
    finally:
        stores.down()


@pytest.fixture(scope="session")
def stack(state_directory: Path) -> Iterator[RunningStack]:
    """The whole stack; see the module's docstring. At its end no log of it holds a secret that the tests saw."""
    complete = Stack(Layout(ROOT, state_directory / "stack"), pick_port(frozenset()), {})
    seen = SecretsSeen()
    try:
        running = RunningStack(complete, complete.up(Progress(None, STEPS)))
        seen.add([*complete.secrets.values(), running.api_key, running.admin_token])
        with watching(running.url, seen):
            yield running
        found = seen.in_logs(complete.layout.log)
        assert not found, f"of {len(seen)} secrets some stand in logs: {found}"
    finally:
        complete.down()


@pytest.fixture(scope="module")
def fresh_database(components: Components) -> Iterator[FreshDatabase]:
    """A factory of databases; see the module's docstring."""
    factory = FreshDatabase(components)
    try:
        yield factory
    finally:
        factory.drop_all()
