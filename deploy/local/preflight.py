"""What the machine must have, and the sentence for each thing that it lacks. Standard library only."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import LaunchError
from deploy.local.ports import port_is_free

DISK_SETUP_GIB = 3  # the environments, with what pip and npm unpack on the way
DISK_RUN_GIB = 1
# The newest C library that a wheel here asks for (nvidia-pytriton: manylinux_2_35).
GLIBC_MINIMUM = (2, 35)
# Of those that Triton's wheel has a stub for, the ones that numpy < 2 has wheels for.
TRITON_PYTHONS = ("3.11", "3.12")
PROBE_TIMEOUT_S = 20
NETWORK_SIGNS = (
    "Temporary failure in name resolution",
    "Name or service not known",
    "Failed to establish a new connection",
    "Network is unreachable",
    "Connection refused",
    "Connection timed out",
    "Read timed out",
    "ProxyError",
    "getaddrinfo",
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "ENETUNREACH",
)
_PROBE = """
import json, sys, sysconfig
print(json.dumps({"version": "%d.%d" % sys.version_info[:2], "directory": sysconfig.get_config_var("LIBDIR"),
                  "multiarch": sysconfig.get_config_var("MULTIARCH"), "executable": sys.executable}))
"""


@dataclass(frozen=True, slots=True)
class SharedPython:
    """A Python that Triton's stub can embed: `library` is the directory of its libpython3.x.so.1.0."""

    executable: Path
    version: str
    library: Path


def check_machine(system: str | None = None, machine: str | None = None, libc: tuple[str, str] | None = None) -> None:
    """Linux on x86-64 with a recent GNU C library. Raises LaunchError; the arguments stand in for this machine's."""
    system, machine = system or platform.system(), machine or platform.machine()
    if system != "Linux" or machine not in {"x86_64", "AMD64"}:
        raise LaunchError(
            f"The embedded stack runs on Linux x86-64 only, and this is {system} {machine}. "
            "Use docker-compose.yml instead."
        )
    name, version = libc or platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC_MINIMUM:
        wanted = ".".join(map(str, GLIBC_MINIMUM))
        raise LaunchError(
            f"Tritonserver needs the GNU C library {wanted} or newer (Debian 12, Ubuntu 22.04), and this machine has "
            f"{name or 'another library'} {version}. Use docker-compose.yml instead."
        )


def check_python_modules(present: Sequence[str] | None = None) -> None:
    """venv and pip of the running Python, which Debian packages apart. Raises LaunchError."""
    wanted = ("venv", "ensurepip")
    found = present if present is not None else [name for name in wanted if importlib.util.find_spec(name)]
    if missing := [name for name in wanted if name not in found]:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise LaunchError(
            f"{sys.executable} has no {' and no '.join(missing)}. On Debian and Ubuntu: "
            f"sudo apt install python{version}-venv"
        )


def check_disk(path: Path, needed_gib: int, free_bytes: int | None = None) -> None:
    """Room below `path`, which need not exist yet. Raises LaunchError."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free if free_bytes is None else free_bytes
    if free < needed_gib * 1024**3:
        raise LaunchError(
            f"The disk of {existing} has {free / 1024**3:.1f} GiB free, and Tollgate needs {needed_gib} GiB there. "
            "Free some; TOLLGATE_STATE can name a state directory on another disk."
        )


def check_port(port: int) -> None:
    """The gateway's port is free. Raises LaunchError."""
    if not port_is_free(port):
        raise LaunchError(
            f"Port {port} of 127.0.0.1 is taken (or not yours to use). Choose another for the gateway: "
            f"make up TOLLGATE_PORT={port + 10 if port < 65_000 else 8090}"
        )


def find_shared_python(candidates: Sequence[str] | None = None) -> SharedPython:
    """A Python 3.11 or 3.12 with its shared library. Raises LaunchError that names the package to install."""
    versions = list(TRITON_PYTHONS)
    names = [sys.executable, *(f"python{v}" for v in versions), *(f"/usr/bin/python{v}" for v in versions)]
    seen = []
    for name in candidates if candidates is not None else names:
        facts = _probe(name)
        if facts is None or facts["version"] not in TRITON_PYTHONS:
            continue
        seen.append(facts["version"])
        library = _library_directory(facts)
        if library is not None:
            return SharedPython(Path(facts["executable"]), facts["version"], library)
    if seen:
        raise LaunchError(
            f"Triton's Python backend needs libpython{seen[0]}.so.1.0, and Python {seen[0]} here comes without it. "
            f"On Debian and Ubuntu: sudo apt install libpython{seen[0]} (pyenv: build with "
            "PYTHON_CONFIGURE_OPTS=--enable-shared)."
        )
    raise LaunchError(
        "Triton's Python backend needs Python 3.11 or 3.12 with its shared library, and neither is here. "
        "On Debian 12: sudo apt install python3.11 libpython3.11; on Ubuntu 24.04: sudo apt install python3.12 "
        "libpython3.12; anywhere: uv python install 3.12, then put it on PATH."
    )


def _probe(executable: str) -> dict[str, str] | None:
    path = shutil.which(executable)
    if path is None:
        return None
    command = (path, "-I", "-c", _PROBE)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
        facts: dict[str, str] = json.loads(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # a shim without a version behind it
    return facts


def _library_directory(facts: dict[str, str]) -> Path | None:
    directory = facts["directory"] or "/usr/lib"
    multiarch = facts["multiarch"] or "x86_64-linux-gnu"
    places = (Path(directory), Path(directory) / multiarch, Path("/usr/lib") / multiarch, Path("/usr/lib64"))
    return next((place for place in places if (place / f"libpython{facts['version']}.so.1.0").exists()), None)


def explain_failure(what: str, output: str) -> str:
    """The sentence for a package installation that failed, by what pip or npm said."""
    tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[-20:])
    if "No space left on device" in output or "ENOSPC" in output:
        sentence = f"The disk is full; Tollgate needs {DISK_SETUP_GIB} GiB."
    elif any(sign in output for sign in NETWORK_SIGNS):
        sentence = (
            "No package index could be reached. The first start downloads packages: check the network, or point pip "
            "and npm to a mirror (pip config set global.index-url …, npm config set registry …)."
        )
    elif "SELF_SIGNED_CERT" in output or "CERTIFICATE_VERIFY_FAILED" in output:
        sentence = (
            "The package index shows a certificate that is not trusted here, as behind a company's proxy. Name its "
            "authority: PIP_CERT and NODE_EXTRA_CA_CERTS take the path of a PEM file."
        )
    elif "do not match the hashes" in output or "EINTEGRITY" in output:
        sentence = "A downloaded package is not the one that the lock file names; the index or a proxy changed it."
    else:
        sentence = "The package manager's own words are above."
    return f"{what} failed:\n{tail}\n  {sentence}"
