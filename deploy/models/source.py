"""What FROM is: a GGUF file, a directory with a Hugging Face model, or the id of one on the hub."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from deploy.models.errors import ModelError
from services.inference.backend.gguf import GgufHead, GgufInvalid, read_head

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
HEADER_BYTES_MAX = 1 << 27


class Kind(Enum):
    GGUF = "gguf"
    DIRECTORY = "directory"
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights come from. `name` is the file, the directory or the hub's id."""

    kind: Kind
    name: str

    @property
    def path(self) -> Path:
        return Path(self.name)


def find(text: str) -> Source:
    """Raises ModelError for what is none of the three, or is broken in a way that can be told at once."""
    path = Path(text).expanduser()
    if path.is_file():
        check_gguf(path)
        return Source(Kind.GGUF, str(path))
    if path.is_dir():
        check_directory(path)
        return Source(Kind.DIRECTORY, str(path))
    if HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return Source(Kind.HUB, text)
    raise ModelError(f"FROM={text}: there is no such file or directory, and it is no hub id (owner/name).")


def check_gguf(path: Path) -> GgufHead:
    """The head of a whole GGUF file. Raises ModelError."""
    try:
        head = read_head(path)
    except (GgufInvalid, OSError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not head.tensors or not head.architecture:
        raise ModelError(f"{path}: the file holds no model.")
    return head


def check_directory(path: Path) -> str:
    """The first architecture that config.json names. Raises ModelError for missing or truncated files."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        architecture = str(config["architectures"][0])
    except FileNotFoundError:
        raise ModelError(f"{path} has no {CONFIG}: it is no Hugging Face model.") from None
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise ModelError(f"{path / CONFIG} names no architecture: it is damaged, or of no model.") from error
    files = _weight_files(path)
    if not files:
        raise ModelError(f"{path} has no weights (*.safetensors).")
    for file in files:
        _check_safetensors(file)
    return architecture


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError) as error:
        raise ModelError(f"{index} is damaged.") from error
    missing = sorted(name for name in names if not (path / str(name)).is_file())
    if missing:
        raise ModelError(f"{path} is incomplete: {len(missing)} of its files are missing, {missing[0]} first.")
    return [path / name for name in sorted(names)]


def _check_safetensors(file: Path) -> None:
    """Its header says how long it is."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_BYTES_MAX + 1
        if length > min(size, HEADER_BYTES_MAX):
            raise ModelError(f"{file} is no safetensors file, or is truncated.")
        try:
            header = json.loads(stream.read(length))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} has a damaged header.") from error
    if 8 + length + end > size:
        raise ModelError(f"{file} is truncated: it has {size:,} bytes and needs {8 + length + end:,}.")
