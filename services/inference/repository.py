"""What operators want of the builds, in a file that survives restarts and that all replicas of a machine share."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from services.inference.domain import Wanted


@dataclass(frozen=True, slots=True)
class Desired:
    """An operator's word on one build. `version` pins a folder of the build; None is the highest."""

    wanted: Wanted = Wanted.AUTO
    version: str | None = None


class DesiredFile:
    """JSON: build → {"wanted", "version"}. A file that cannot be read says nothing about any build."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._entries: dict[str, Desired] = {}

    def of(self, build: str) -> Desired:
        """What is wanted now; the file is read again when it has changed."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_size)
            if seen != self._seen:
                self._entries = _parse(self._path.read_bytes())
                self._seen = seen
        except FileNotFoundError:
            self._entries, self._seen = {}, None
        return self._entries.get(build, Desired())

    def change(self, build: str, **changes: Any) -> Desired:
        """Replace fields of one build's entry. Raises OSError."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._seen = None
            desired = replace(self.of(build), **changes)
            self._entries[build] = desired
            part = self._path.with_suffix(".part")
            kept = {name: asdict(entry) for name, entry in self._entries.items() if entry != Desired()}
            part.write_text(json.dumps(kept, indent=1, default=lambda value: value.value))
            part.replace(self._path)
            self._seen = None
            return desired


def _parse(content: bytes) -> dict[str, Desired]:
    try:
        entries = json.loads(content)
        return {name: Desired(Wanted(entry["wanted"]), entry["version"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
