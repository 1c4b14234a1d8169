"""Tollgate's own services as programs: what each one is told, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

from deploy.local.postgres import Postgres
from deploy.local.programs import Program, http_health
from deploy.local.state import Layout
from deploy.local.triton import Triton
from deploy.local.unleash import Unleash
from deploy.local.valkey import Valkey

# Settings that a person may give to `make up` and that reach every service as they are.
PASSED_ON = ("TOLLGATE_LOG_LEVEL", "TOLLGATE_SIGNUP_CREDITS", "OTEL_EXPORTER_OTLP_ENDPOINT")
DRAIN_TIMEOUT_S = 10
# Those with a role in PostgreSQL; the gateway's may only read.
WITH_DATABASE = ("auth", "billing", "chat", "gateway")
SIGNUP_CREDITS = "100"


def database_variable(service: str) -> str:
    """The name of the setting that holds the URL of a service's own role."""
    return f"TOLLGATE_{service.upper()}_DATABASE_URL"


@dataclass(frozen=True, slots=True)
class Services:
    """The services of one stack and the addresses that they find each other by."""

    layout: Layout
    secrets: Mapping[str, str]
    ports: Mapping[str, int]
    postgres: Postgres
    valkey: Valkey
    unleash: Unleash
    triton: Triton
    passed_on: Mapping[str, str]

    def address(self, port: str) -> str:
        """host:port of one of the stack's ports."""
        return f"127.0.0.1:{self.ports[port]}"

    @property
    def public_url(self) -> str:
        return f"http://{self.address('gateway')}"

    def environment(self, service: str) -> dict[str, str]:
        """Everything that a service (or its `migrate`) is told."""
        return self._shared() | self._own(service)

    def administration(self, service: str) -> dict[str, str]:
        """The same for commands that migrate or seed: with the owner of all schemas, which no server gets, and every
        role that a migration makes or gives rights to.
        """
        roles = {database_variable(name): self.postgres.url(user=f"tollgate_{name}") for name in WITH_DATABASE}
        return self.environment(service) | roles | {"TOLLGATE_DATABASE_URL": self.postgres.url()}

    def _shared(self) -> dict[str, str]:
        return {
            "TOLLGATE_REDIS_URL": self.valkey.url,
            "TOLLGATE_IDENTITY_KEYS": self.secrets["identity_keys"],
            "TOLLGATE_PUBLIC_URL": self.public_url,
            "TOLLGATE_BILLING_GRPC": self.address("billing_grpc"),
            "TOLLGATE_INFERENCE_GRPC": self.address("inference_grpc"),
            "TOLLGATE_DRAIN_TIMEOUT_S": str(DRAIN_TIMEOUT_S),
            "TOLLGATE_SIGNUP_CREDITS": SIGNUP_CREDITS,
            **self.passed_on,
        }

    def _own(self, service: str) -> dict[str, str]:
        name = service.upper()
        own = {}
        if service in WITH_DATABASE:
            own[database_variable(service)] = self.postgres.url(user=f"tollgate_{service}")
        if service == "gateway":
            addresses = {
                f"TOLLGATE_{other.upper()}_URL": f"http://{self.address(f'{other}_http')}"
                for other in ("auth", "billing", "chat", "inference")
            }
            own |= addresses | {
                "TOLLGATE_GATEWAY_LISTEN": self.address("gateway"),
                "TOLLGATE_GATEWAY_INTERNAL_LISTEN": self.address("gateway_internal"),
            }
        else:
            own[f"TOLLGATE_{name}_HTTP_LISTEN"] = self.address(f"{service}_http")
            if f"{service}_grpc" in self.ports:
                own[f"TOLLGATE_{name}_GRPC_LISTEN"] = self.address(f"{service}_grpc")
        if service in {"auth", "gateway"}:
            own["TOLLGATE_API_KEY_PEPPERS"] = self.secrets["api_key_peppers"]
        if service == "auth":
            own["TOLLGATE_AUTH_SELF_SERVICE_ORGS"] = "true"
            own["TOLLGATE_AUTH_SECRET_KEY"] = self.secrets["auth_secret_key"]
        if service == "billing":
            own["TOLLGATE_BILLING_SECRET_KEYS"] = self.secrets["billing_secret_keys"]
        if service in {"chat", "inference"}:
            own |= {
                "TOLLGATE_TRITON_GRPC": self.address("triton_grpc"),
                "TOLLGATE_TRITON_METRICS_URL": self.triton.metrics_url,
                "TOLLGATE_MODEL_REPOSITORY": str(self.triton.repository),
                "TOLLGATE_UNLEASH_URL": f"{self.unleash.url}/api",
                "TOLLGATE_UNLEASH_TOKEN": self.secrets["unleash_client_token"],
                "TOLLGATE_FLAGS_BACKUP": str(self.layout.state / f"flags-{service}.json"),
            }
        if service == "inference":
            own["TOLLGATE_INFERENCE_DESIRED_FILE"] = str(self.layout.state / "desired-builds.json")
        return own

    def program(self, service: str) -> Program:
        """One of auth, billing, chat, inference, gateway."""
        internal = "gateway_internal" if service == "gateway" else f"{service}_http"
        ready = "gateway" if service == "gateway" else internal
        names = ("gateway", internal) if service == "gateway" else (internal, f"{service}_grpc")
        return Program(
            name=service,
            title=service,
            command=(str(self.layout.python), "-m", f"services.{service}"),
            directory=self.layout.root,
            environment=self.environment(service),
            ports=tuple(self.ports[name] for name in names if name in self.ports),
            health=http_health(f"http://{self.address(ready)}/readyz"),
            deadline_s=120,
            remedy=f"The log names the setting or the component that {service} misses; `make status` shows the others.",
            stop_wait_s=DRAIN_TIMEOUT_S + 5,
        )
