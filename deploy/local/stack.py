"""One stack from start to end: what is started in which order and waited for."""

import time
from collections.abc import Mapping

from deploy.local import processes
from deploy.local.errors import LaunchError
from deploy.local.health import wait_healthy, why_unhealthy
from deploy.local.postgres import Postgres
from deploy.local.programs import Program
from deploy.local.progress import Progress
from deploy.local.seed import Keys, Seed
from deploy.local.services import PASSED_ON, Services
from deploy.local.shutdown import stop_everything
from deploy.local.state import Layout, load_ports, load_secrets, write_private
from deploy.local.supervisor import Supervisor, render_config
from deploy.local.triton import Triton
from deploy.local.unleash import CONSOLE_USER, Unleash
from deploy.local.valkey import Valkey

SERVICES = ("auth", "billing", "inference", "chat", "gateway")
STEPS = 7 + len(SERVICES)


class Stack:
    """Everything that `make up` starts."""

    def __init__(self, layout: Layout, gateway_port: int, environment: Mapping[str, str]) -> None:
        """Make or read the state directory. Ports that were taken meanwhile change while the stack is stopped."""
        layout.prepare()
        self.layout = layout
        self.supervisor = Supervisor(layout)
        self.secrets = load_secrets(layout)
        self.ports = load_ports(layout, gateway_port, check=not self.supervisor.is_running())
        self.postgres = Postgres(layout, self.secrets, self.ports["postgres"])
        self.valkey = Valkey(layout, self.secrets, self.ports["valkey"])
        self.unleash = Unleash(layout, self.secrets, self.ports["unleash"], self.postgres)
        self.triton = Triton(
            layout,
            http_port=self.ports["triton_http"],
            grpc_port=self.ports["triton_grpc"],
            metrics_port=self.ports["triton_metrics"],
            otlp_endpoint=environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        )
        self.services = Services(
            layout=layout,
            secrets=self.secrets,
            ports=self.ports,
            postgres=self.postgres,
            valkey=self.valkey,
            unleash=self.unleash,
            triton=self.triton,
            passed_on={name: environment[name] for name in PASSED_ON if environment.get(name)},
        )
        self.seed = Seed(layout, self.services)

    def programs(self) -> dict[str, Program]:
        """Every program by its name, in the order of starting."""
        components = (self.postgres.program(), self.valkey.program(), self.triton.program(), self.unleash.program())
        programs = (*components, *(self.services.program(name) for name in SERVICES))
        return {program.name: program for program in programs}

    def unhealthy(self) -> dict[str, str]:
        """What is wrong with each program that is not healthy."""
        problems = {name: why_unhealthy(self.supervisor, program) for name, program in self.programs().items()}
        return {name: problem for name, problem in problems.items() if problem is not None}

    def start_data_stores(self) -> None:
        """Only PostgreSQL, with its databases, and Valkey: what tests below the whole stack need.

        Raises LaunchError; down() cleans up in any case.
        """
        self.postgres.initialise()
        self.valkey.initialise()
        programs = (self.postgres.program(), self.valkey.program())
        self.supervisor.launch(programs, processes.marker(self.layout.stack_id))
        for program in programs:
            self.supervisor.start(program.name)
        for program in programs:
            wait_healthy(self.supervisor, self.layout, program)
        self.postgres.create_databases()

    def up(self, progress: Progress) -> Keys:
        """Start what does not run, in order, and wait for each program's health.

        Raises LaunchError. The caller stops the stack when this fails or is interrupted.
        """
        programs = self.programs()
        with progress.step(programs["postgres"].title):
            if not self.supervisor.is_running():
                stop_everything(self.layout)
                if self.postgres.initialise():
                    self.seed.forget()
                self.valkey.initialise()
                self.supervisor.launch(programs.values(), processes.marker(self.layout.stack_id))
            began = self._start("postgres", "valkey", "triton")
            wait_healthy(self.supervisor, self.layout, programs["postgres"])
            self.postgres.create_databases()
        began |= self._start("unleash")
        with progress.step("database migrations", "done"):
            self.seed.migrate()
        for name in ("valkey", "triton"):
            self._wait(progress, programs[name], began[name])
        with progress.step("prices, demo user, keys", "done"):
            self.seed.prices()
            keys = self.seed.keys()
        began |= self._start(*SERVICES)
        self._wait(progress, programs["unleash"], began["unleash"])
        with progress.step("model rollout flags", "done"):
            self.seed.flags()
        for name in SERVICES:
            self._wait(progress, programs[name], began[name])
        self.write_dev_env(keys)
        return keys

    def _start(self, *names: str) -> dict[str, float]:
        """Start programs that do not run; when each was told to, on the monotonic clock."""
        began = {}
        for name in names:
            began[name] = time.monotonic()
            self.supervisor.start(name)
        return began

    def _wait(self, progress: Progress, program: Program, began_s: float) -> None:
        with progress.step(program.title, since_s=began_s):
            wait_healthy(self.supervisor, self.layout, program)

    def down(self) -> None:
        """Stop everything. Raises LaunchError when something stays."""
        stop_everything(self.layout)

    def is_outdated(self) -> bool:
        """Whether the running stack was started with other settings than it would be now."""
        try:
            running = self.layout.supervisor_config.read_text()
        except OSError:
            return True
        return running != render_config(self.layout, self.programs().values())

    def write_dev_env(self, keys: Keys) -> None:
        """Addresses and secrets for scripts: `set -a; . .tollgate/dev.env`. Mode 600."""
        values = self.dev_env(keys)
        # No value holds a character that a shell or an env-file reader would treat specially, so none is quoted.
        lines = [f"{name}={value}" for name, value in values.items()]
        write_private(self.layout.dev_env, "\n".join(["# Written by `make up`.", *lines]) + "\n")

    def dev_env(self, keys: Keys) -> dict[str, str]:
        """What dev.env holds."""
        services: dict[str, str] = {}
        for name in SERVICES:
            port = "gateway_internal" if name == "gateway" else f"{name}_http"
            services[f"TOLLGATE_{name.upper()}_HTTP_URL"] = f"http://{self.services.address(port)}"
            if f"{name}_grpc" in self.ports:
                services[f"TOLLGATE_{name.upper()}_GRPC"] = self.services.address(f"{name}_grpc")
        return {
            "TOLLGATE_URL": self.services.public_url,
            "TOLLGATE_API_KEY": keys.api_key,
            "TOLLGATE_ADMIN_TOKEN": keys.admin_token,
            "TOLLGATE_DEMO_USER": "demo",
            "TOLLGATE_DEMO_PASSWORD": self.secrets["demo_password"],
            "TOLLGATE_ADMIN_USER": "admin",
            "TOLLGATE_ADMIN_PASSWORD": self.secrets["admin_password"],
            "TOLLGATE_DATABASE_URL": self.postgres.url(),
            "TOLLGATE_REDIS_URL": self.valkey.url,
            "UNLEASH_URL": self.unleash.url,
            "UNLEASH_ADMIN_TOKEN": self.secrets["unleash_admin_token"],
            "UNLEASH_USER": CONSOLE_USER,
            "UNLEASH_PASSWORD": self.secrets["unleash_password"],
            "TRITON_HTTP_URL": f"http://{self.services.address('triton_http')}",
            "TRITON_GRPC_URL": self.services.address("triton_grpc"),
            "TRITON_METRICS_URL": self.triton.metrics_url,
            **services,
        }


def gateway_port(environment: Mapping[str, str], kept: int | None) -> int:
    """TOLLGATE_PORT, else the port of the last start, else 8080. Raises LaunchError for what is no port."""
    text = environment.get("TOLLGATE_PORT") or str(kept or 8080)
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise LaunchError(f"TOLLGATE_PORT is {text!r}; it must be a port between 1 and 65535.")
    return int(text)
