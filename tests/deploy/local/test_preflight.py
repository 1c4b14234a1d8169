"""Each thing that a machine may lack is named in a sentence, before anything is downloaded."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import preflight
from deploy.local.errors import LaunchError
from deploy.local.ports import pick_port

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_other_machines_are_sent_to_docker(system: str, machine: str) -> None:
    with pytest.raises(LaunchError, match=rf"Linux x86-64 only, and this is {system} {machine}"):
        preflight.check_machine(system, machine)


@pytest.mark.parametrize("libc", [("glibc", "2.31"), ("", "")])
def test_old_or_other_c_library(libc: tuple[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"needs the GNU C library 2\.35"):
        preflight.check_machine("Linux", "x86_64", libc)


def test_this_machine_will_do() -> None:
    preflight.check_machine()
    preflight.check_machine("Linux", "x86_64", ("glibc", "2.35"))


def test_missing_venv_names_the_package() -> None:
    with pytest.raises(LaunchError, match=r"has no ensurepip.*sudo apt install python3\.\d+-venv"):
        preflight.check_python_modules(["venv"])


def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"has 0\.5 GiB free, and Tollgate needs 3 GiB"):
        preflight.check_disk(tmp_path / "not" / "yet", 3, free_bytes=2**29)


def test_taken_port_names_port_and_variable() -> None:
    port = pick_port()
    taken = pytest.raises(LaunchError, match=rf"Port {port} .*make up TOLLGATE_PORT=")
    with socket.create_server(("127.0.0.1", port)), taken:
        preflight.check_port(port)
    preflight.check_port(port)


def fake_python(directory: Path, version: str, library: Path) -> str:
    """An executable that answers the probe as a Python of that version would."""
    path = directory / f"python{version}"
    facts = f'{{"version": "{version}", "directory": "{library}", "multiarch": "none", "executable": "{path}"}}'
    path.write_text(f"#!/bin/sh\necho '{facts}'\n")
    path.chmod(0o755)
    return str(path)


def test_python_without_shared_library_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"needs libpython3\.12\.so\.1\.0.*sudo apt install libpython3\.12"):
        # A version that the fixed places of this machine could hold would hide the sentence.
        preflight.find_shared_python([fake_python(tmp_path, "3.12", tmp_path / "nowhere")])


def test_no_suitable_python_at_all(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"Python 3\.11 or 3\.12 with its shared library"):
        preflight.find_shared_python([fake_python(tmp_path, "3.13", tmp_path), str(tmp_path / "absent")])


def test_shared_library_is_found(tmp_path: Path) -> None:
    (tmp_path / "libpython3.12.so.1.0").touch()
    found = preflight.find_shared_python([fake_python(tmp_path, "3.12", tmp_path)])
    assert (found.version, found.library) == ("3.12", tmp_path)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("NewConnectionError: Temporary failure in name resolution", "No package index could be reached"),
        ("npm error code ENOTFOUND", "No package index could be reached"),
        ("npm error code SELF_SIGNED_CERT_IN_CHAIN", "certificate that is not trusted"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES … do not match the hashes", "not the one that the lock file"),
        ("something else", "own words are above"),
    ],
)
def test_failed_installations_are_explained(output: str, sentence: str) -> None:
    text = preflight.explain_failure("The environment .venv", output)
    assert sentence in text
    assert output in text


def test_old_python_is_told_in_a_sentence() -> None:
    """`__main__` must stay readable for the Python that it refuses."""
    source = (ROOT / "deploy" / "local" / "__main__.py").read_text()
    guard = source.partition("from deploy.local.bootstrap")[0]
    script = f"import sys\nsys.version_info = (3, 8, 10, 'final', 0)\n{guard}\nprint('went on')"
    result = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert re.fullmatch(r"Tollgate needs Python 3\.11 or newer; \S+ is 3\.8\.10.*PYTHON=python3\.12\n", result.stderr)
    assert "f'" not in guard
    assert 'f"' not in guard


@pytest.mark.parametrize("command", ["down", "status", "logs", "reset"])
def test_nothing_to_do_in_an_empty_state(command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TOLLGATE_STATE": str(tmp_path / "none")}
    result = subprocess.run(
        (sys.executable, "-m", "deploy.local.cli", command),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in result.stderr
    assert re.search(r"(no|No) (stack|logs)", result.stdout + result.stderr)
