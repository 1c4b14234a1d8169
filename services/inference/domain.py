"""The model catalogue: which alias is served by which builds, and in what state they are."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, TypeVar

from services.inference.errors import CatalogueInvalid

KINDS = ("chat", "embedding", "rerank")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
KEYS_OF_BUILD = {"engine", "quantization", "context_tokens", "slots", "parameters", "residency"}
RESIDENCIES = ("always", "on_demand")
BUILDS_MAX = 200
TEXT_CHARACTERS_MAX = 500

V = TypeVar("V", str, int)


@dataclass(frozen=True, slots=True)
class Build:
    """One set of weights behind one engine. `name` is also its model name in Triton.

    `context_tokens` is what one request may use, prompt and completion together; `parameters` is the
    number of weights, 0 when unknown. An `on_demand` build is loaded when somebody asks for it and unloaded when
    nobody has for a while.
    """

    name: str
    engine: str
    quantization: str
    context_tokens: int
    slots: int
    parameters: int
    on_demand: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A public alias. `created` is in unix seconds; `stable` names the build served when flags say nothing."""

    alias: str
    kind: str
    description: str
    created: int
    stable: str
    builds: tuple[Build, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every model, in the file's order. A build belongs to exactly one model."""

    models: tuple[Model, ...]

    @property
    def builds(self) -> dict[str, Build]:
        return {build.name: build for model in self.models for build in model.builds}

    def alias_of(self, build: str) -> str:
        """The alias that a build serves. Raises KeyError."""
        for model in self.models:
            if any(b.name == build for b in model.builds):
                return model.alias
        raise KeyError(build)


class BuildState(Enum):
    READY = "ready"
    LOADING = "loading"
    UNAVAILABLE = "unavailable"
    UNLOADED = "unloaded"
    """On purpose: an operator's, or nobody has asked for it."""


class Wanted(Enum):
    """What an operator says about a build."""

    AUTO = "auto"
    LOADED = "loaded"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class BuildStatus:
    """`reason` says in one sentence why a build is not ready; `lost_at` when it last failed while it was serving: what
    was under way then is gone, even when it is ready again before anybody looked.
    """

    state: BuildState
    reason: str
    since: datetime
    lost_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the catalogue looks like at one moment. `revision` grows with every change, restarts included."""

    catalogue: Catalogue
    statuses: dict[str, BuildStatus]
    versions: dict[str, str]
    revision: int


@dataclass(frozen=True, slots=True)
class Room:
    """How much may be loaded: a share of the memory that may be in use, and a number of builds."""

    memory_share_max: float = 0.85
    builds_max: int = 16


def parse_catalogue(text: str) -> Catalogue:
    """Read catalogue.toml. Raises CatalogueInvalid, whose message names the place and the remedy."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise CatalogueInvalid(f"not valid TOML: {e}") from e
    _no_other_keys(document, {"models"}, "the file")
    models = tuple(_model(alias, entry) for alias, entry in _table(document, "models", "the file").items())
    owners: dict[str, str] = {}
    for model in models:
        for build in model.builds:
            if build.name in owners:
                raise CatalogueInvalid(f"build {build.name!r} is listed by {owners[build.name]!r} and {model.alias!r}")
            owners[build.name] = model.alias
    if len(owners) > BUILDS_MAX:
        raise CatalogueInvalid(f"{len(owners)} builds; at most {BUILDS_MAX} are allowed")
    return Catalogue(models)


def _model(alias: str, entry: Any) -> Model:
    place = f"models.{alias}"
    _name(alias, place)
    if not isinstance(entry, dict):
        raise CatalogueInvalid(f"{place} must be a table")
    _no_other_keys(entry, {"kind", "description", "created", "stable", "builds"}, place)
    builds = tuple(_build(name, b, f"{place}.builds.{name}") for name, b in _table(entry, "builds", place).items())
    model = Model(
        alias=alias,
        kind=_value(entry, "kind", str, place),
        description=_value(entry, "description", str, place),
        created=_value(entry, "created", int, place),
        stable=_value(entry, "stable", str, place),
        builds=builds,
    )
    if model.kind not in KINDS:
        raise CatalogueInvalid(f"{place}.kind is {model.kind!r}; known: {', '.join(KINDS)}")
    if model.stable not in {b.name for b in builds}:
        raise CatalogueInvalid(f"{place}.stable names {model.stable!r}, which is not one of its builds")
    return model


def _build(name: str, entry: Any, place: str) -> Build:
    _name(name, place)
    if not isinstance(entry, dict):
        raise CatalogueInvalid(f"{place} must be a table")
    _no_other_keys(entry, KEYS_OF_BUILD, place)
    return Build(
        name=name,
        engine=_value(entry, "engine", str, place),
        quantization=_value(entry, "quantization", str, place),
        context_tokens=_value(entry, "context_tokens", int, place, least=16),
        slots=_value(entry, "slots", int, place, least=1),
        parameters=_value(entry, "parameters", int, place) if "parameters" in entry else 0,
        on_demand=_residency(entry, place) == "on_demand",
    )


def _residency(entry: Mapping[str, Any], place: str) -> str:
    value = entry.get("residency", RESIDENCIES[0])
    if value not in RESIDENCIES:
        raise CatalogueInvalid(f"{place}.residency is {value!r}; known: {', '.join(RESIDENCIES)}")
    return str(value)


def _name(name: str, place: str) -> None:
    """Names become folder names, flag names and metric labels."""
    if not NAME.fullmatch(name):
        raise CatalogueInvalid(f"{place}: a name is lower case letters, digits, dots, dashes and underscores")


def _table(entry: Mapping[str, Any], key: str, place: str) -> dict[str, Any]:
    table = entry.get(key)
    if not isinstance(table, dict) or not table:
        raise CatalogueInvalid(f"{place} needs at least one entry under {key!r}")
    return table


def _value(entry: Mapping[str, Any], key: str, kind: type[V], place: str, least: int = 0) -> V:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CatalogueInvalid(f"{place}.{key} must be {'a string' if kind is str else 'an integer'}")
    if isinstance(value, int) and value < least:
        raise CatalogueInvalid(f"{place}.{key} is {value}; at least {least} is needed")
    if isinstance(value, str) and not 1 <= len(value) <= TEXT_CHARACTERS_MAX:
        raise CatalogueInvalid(f"{place}.{key} must have 1 to {TEXT_CHARACTERS_MAX} characters")
    return value


def _no_other_keys(entry: Mapping[str, Any], known: set[str], place: str) -> None:
    unknown = sorted(set(entry) - known)
    if unknown:
        raise CatalogueInvalid(f"{place} has the unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
