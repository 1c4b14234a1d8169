"""The last good flag set: in memory for UnleashClient, on disk for the next start."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openfeature.flag_evaluation import Reason
from UnleashClient.cache import BaseCache
from UnleashClient.constants import ETAG, FEATURES_URL

from shared.telemetry import get_logger

_log = get_logger(__name__)


class InvalidFlagSet(ValueError):
    """The text is not a flag set that Unleash's client API would send."""


@dataclass(frozen=True, slots=True)
class Flag:
    """What the provider must know of a flag beyond its evaluation.

    `reason` is the OpenFeature reason of a successful evaluation; `definition` serves to tell a changed flag.
    """

    reason: Reason
    definition: str


@dataclass(frozen=True, slots=True)
class FlagSet:
    """A parsed flag set. `revision` is Unleash's own, empty where the server names none."""

    flags: Mapping[str, Flag]
    revision: str

    @classmethod
    def parse(cls, raw: str) -> FlagSet:
        """Read the body of `/client/features`. Raises InvalidFlagSet."""
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise InvalidFlagSet("not JSON") from e
        features = document.get("features") if isinstance(document, dict) else None
        if not isinstance(features, list):
            raise InvalidFlagSet("no list of features")
        flags: dict[str, Flag] = {}
        for feature in features:
            if not isinstance(feature, dict) or not isinstance(feature.get("name"), str):
                raise InvalidFlagSet("a feature without a name")
            flags[feature["name"]] = Flag(_reason(feature), json.dumps(feature, sort_keys=True))
        meta = document.get("meta")
        revision = meta.get("revisionId", "") if isinstance(meta, dict) else ""
        return cls(flags, str(revision))

    def changed_since(self, earlier: FlagSet | None) -> list[str]:
        """Names of flags added, removed or edited, sorted."""
        before = earlier.flags if earlier is not None else {}
        return sorted(name for name in self.flags.keys() | before.keys() if self.flags.get(name) != before.get(name))


def _reason(feature: Mapping[str, Any]) -> Reason:
    """The reason that a match of this flag deserves: the strongest of what its active strategies do."""
    if not feature.get("enabled"):
        return Reason.DISABLED
    active = [strategy for strategy in _objects(feature, "strategies") if not strategy.get("disabled")]
    if any(_splits(strategy) for strategy in active):
        return Reason.SPLIT
    if any(_targets(strategy) for strategy in active):
        return Reason.TARGETING_MATCH
    return Reason.STATIC


def _splits(strategy: Mapping[str, Any]) -> bool:
    parameters = strategy.get("parameters")
    rollout = parameters.get("rollout") if isinstance(parameters, dict) else None
    partial = strategy.get("name") == "flexibleRollout" and str(rollout) != "100"
    return partial or len(_objects(strategy, "variants")) > 1


def _targets(strategy: Mapping[str, Any]) -> bool:
    everybody = strategy.get("name") in ("default", "flexibleRollout")
    return bool(strategy.get("constraints") or strategy.get("segments")) or not everybody


def _objects(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = parent.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise InvalidFlagSet(f"{key} is not a list of objects")
    return listed


class FlagStore(BaseCache):
    """UnleashClient's cache, keeping only flag sets that parse, and the last one of them in `backup`.

    UnleashClient writes here from its polling thread; evaluations read `current` from any thread (one reference,
    swapped whole). `accepted` is called after every flag set that was kept, with the names that changed.
    """

    def __init__(
        self, backup: Path | None, bytes_max: int, accepted: Callable[[list[str]], None] | None = None
    ) -> None:
        self._backup = backup
        self._bytes_max = bytes_max
        self._accepted = accepted
        self._values: dict[str, Any] = {}
        self._refused = False
        self.current: FlagSet | None = None
        self._read_backup()

    def set(self, key: str, value: Any) -> None:
        """Keep a value. A flag set that does not parse is refused together with its ETag; the last good one stays."""
        if key == FEATURES_URL:
            self._offer(str(value))
        elif key != ETAG or not self._refused:
            self._values[key] = value

    def mset(self, data: dict[str, Any]) -> None:
        self._values.update(data)

    def get(self, key: str, default: Any | None = None) -> Any:
        return self._values.get(key, default)

    def exists(self, key: str) -> bool:
        return key in self._values

    def destroy(self) -> None:
        """Forget what is in memory. The backup stays: it is for the next start."""
        self.discard()

    def discard(self) -> None:
        """Go back to having no state, as when the engine cannot use what was read."""
        self._values.clear()
        self.current = None
        self.bootstrapped = False

    def _offer(self, raw: str) -> None:
        try:
            if len(raw.encode()) > self._bytes_max:
                raise InvalidFlagSet(f"more than {self._bytes_max} bytes")
            offered = FlagSet.parse(raw)
        except InvalidFlagSet as e:
            self._refused = True
            _log.warning("flag set refused", reason=str(e))
            return
        self._refused = False
        changed = offered.changed_since(self.current)
        first = self.current is None
        self._values[FEATURES_URL] = raw
        self.current = offered
        if changed or first:
            self._write_backup(raw)
        if self._accepted is not None:
            self._accepted(changed)

    def _read_backup(self) -> None:
        if self._backup is None:
            return
        try:
            with self._backup.open("rb") as file:
                content = file.read(self._bytes_max + 1)
            if len(content) > self._bytes_max:
                raise InvalidFlagSet(f"more than {self._bytes_max} bytes")
            raw = content.decode()
            self.current = FlagSet.parse(raw)
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError, InvalidFlagSet) as e:
            _log.warning("flag backup ignored", path=str(self._backup), reason=str(e))
            return
        self._values[FEATURES_URL] = raw
        self.bootstrapped = True

    def _write_backup(self, raw: str) -> None:
        """Replace the backup atomically: a reader sees the old file or the new one, also after a power cut."""
        if self._backup is None:
            return
        temporary: str | None = None
        try:
            self._backup.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._backup.parent, prefix=f".{self._backup.name}.")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._backup)
        except OSError as e:
            # Serving goes on from memory; only the next start would miss it.
            _log.warning("flag backup not written", path=str(self._backup), reason=str(e))
            if temporary is not None:
                with suppress(OSError):
                    Path(temporary).unlink()
