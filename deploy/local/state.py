"""What one stack keeps between runs: where its files are, its secrets, its ports."""

import base64
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError
from deploy.local.ports import pick_port, port_is_free

# sockaddr_un holds 108 bytes, the last one a NUL.
SOCKET_PATH_BYTES = 107

PORT_NAMES = (
    "gateway_internal",
    "postgres",
    "valkey",
    "unleash",
    "triton_http",
    "triton_grpc",
    "triton_metrics",
    "auth_http",
    "billing_http",
    "billing_grpc",
    "chat_http",
    "inference_http",
    "inference_grpc",
)

# The lock file, which prepare() makes first, tells a state directory from any other.
STATE_MARK = "stack.lock"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one stack: `root` is the checkout, `state` the directory that holds everything it writes.

    `model_repository` is None for the checkout's own.
    """

    root: Path
    state: Path
    model_repository: Path | None = None

    @property
    def stack_id(self) -> str:
        """Twelve hexadecimal digits that name this stack among those of the machine."""
        return hashlib.sha256(str(self.state).encode()).hexdigest()[:12]

    @property
    def log(self) -> Path:
        return self.state / "log"

    @property
    def dev_env(self) -> Path:
        return self.state / "dev.env"

    @property
    def models(self) -> Path:
        """The model repository: the checkout's unless another one was named."""
        return self.model_repository or self.root / "triton_models"

    @property
    def prices(self) -> Path:
        """The price list: that of a model repository elsewhere when it has one."""
        own = self.models / "prices.toml"
        return own if own.is_file() else self.root / "deploy" / "local" / "prices.toml"

    @property
    def supervisor_config(self) -> Path:
        return self.state / "supervisord.conf"

    @property
    def supervisor_pid(self) -> Path:
        return self.state / "supervisord.pid"

    @property
    def supervisor_socket(self) -> Path:
        """In the state directory, or in a short private one where that path is too long for a socket."""
        path = self.state / "supervisor.sock"
        # supervisord binds a temporary name with its pid appended, then renames it.
        if len(os.fsencode(path)) + len(".4194304") <= SOCKET_PATH_BYTES:
            return path
        return Path("/tmp") / f"tollgate-{os.geteuid()}-{self.stack_id}" / "supervisor.sock"  # noqa: S108 mode 700, checked in prepare()

    @property
    def python(self) -> Path:
        return self.root / ".venv" / "bin" / "python"

    @property
    def triton_environment(self) -> Path:
        return self.root / ".venv-triton"

    @property
    def unleash_package(self) -> Path:
        return self.root / "deploy" / "unleash"

    def check_owned(self) -> None:
        """Raises LaunchError for a directory that holds something else than a stack: it is not ours to change."""
        if self.state.is_dir() and any(self.state.iterdir()) and not (self.state / STATE_MARK).exists():
            raise LaunchError(
                f"{self.state} is not empty and holds no stack of Tollgate; choose another TOLLGATE_STATE."
            )

    def prepare(self) -> None:
        """Make the directories. As root others may pass through (PostgreSQL runs as a user of its own), not list.

        Raises LaunchError when a directory cannot be made, belongs to somebody else, or holds other things.
        """
        self.check_owned()
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            (self.state / STATE_MARK).touch(mode=0o600)
            self.state.chmod(0o711 if os.geteuid() == 0 else 0o700)
            for directory in (self.log, self.supervisor_socket.parent):
                if directory != self.state:
                    directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise LaunchError(f"The state directory {self.state} cannot be made: {error.strerror}.") from None
        if self.supervisor_socket.parent.stat().st_uid != os.geteuid():
            raise LaunchError(f"{self.supervisor_socket.parent} belongs to another user; remove it.")


def layout_from(root: Path, environment: Mapping[str, str]) -> Layout:
    """The layout that TOLLGATE_STATE and TOLLGATE_MODEL_REPOSITORY ask for; without them all is in the checkout."""
    configured = environment.get("TOLLGATE_STATE") or ".tollgate"
    models = environment.get("TOLLGATE_MODEL_REPOSITORY")
    return Layout(
        root=root,
        state=(root / Path(configured).expanduser()).resolve(),
        model_repository=(root / Path(models).expanduser()).resolve() if models else None,
    )


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically; only its owner may read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def exclusive(layout: Layout) -> Iterator[None]:
    """Hold the stack's lock, so that two commands never start or stop it at once.

    Raises LaunchError when another command holds it, or when the directory is not a stack's.
    """
    layout.check_owned()
    with (layout.state / STATE_MARK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"Another command is starting or stopping the stack in {layout.state}; wait for it to end."
            ) from None
        yield


def load_secrets(layout: Layout) -> Mapping[str, str]:
    """The stack's secrets, generated on the first call and kept (mode 600). New names are added as they appear."""
    path = layout.state / "secrets.json"
    kept: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    missing = {name: value for name, value in _generated_secrets() if name not in kept}
    if missing:
        kept |= missing
        write_private(path, json.dumps(kept, indent=1))
    return kept


def _generated_secrets() -> Iterator[tuple[str, str]]:
    def base64_key() -> str:
        return base64.b64encode(secrets.token_bytes(32)).decode()

    for name in ("postgres_superuser", "postgres_owner", "postgres_unleash", "valkey"):
        yield name, secrets.token_hex(16)
    for service in ("auth", "billing", "chat", "gateway"):
        yield f"postgres_{service}", secrets.token_hex(16)
    yield "identity_keys", f"k1:{base64_key()}"
    yield "api_key_peppers", f"1:{base64_key()}"
    yield "auth_secret_key", base64_key()
    yield "billing_secret_keys", f"k1:{base64_key()}"
    yield "unleash_session_secret", secrets.token_hex(32)
    # Unleash reads the part before the dot as <projects>:<environment>.
    yield "unleash_admin_token", f"*:*.{secrets.token_hex(28)}"
    yield "unleash_client_token", f"default:development.{secrets.token_hex(28)}"
    yield "unleash_password", secrets.token_urlsafe(12)
    yield "demo_password", secrets.token_urlsafe(12)
    yield "admin_password", secrets.token_urlsafe(12)


def load_ports(layout: Layout, gateway: int, *, check: bool) -> Mapping[str, int]:
    """Every port of the stack: the kept ones, with new ones for those that are missing.

    `check` (a stopped stack) also replaces ports that another program took meanwhile; the gateway's is the
    caller's choice and never replaced.
    """
    path = layout.state / "ports.json"
    kept: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    ports = {"gateway": gateway}
    for name in PORT_NAMES:
        port = kept.get(name)
        if port is None or port in ports.values() or (check and not port_is_free(port)):
            port = pick_port(frozenset(ports.values()) | frozenset(kept.values()))
        ports[name] = port
    if ports != kept:
        write_private(path, json.dumps(ports, indent=1))
    return ports


def kept_gateway_port(layout: Layout) -> int | None:
    """The gateway's port of the last start, if there was one."""
    path = layout.state / "ports.json"
    if not path.exists():
        return None
    port = json.loads(path.read_text()).get("gateway")
    return int(port) if port is not None else None
