"""Models and their builds, and which of them serves a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from services.chat.errors import context_length_exceeded


class BuildState(Enum):
    READY = "ready"
    LOADING = "loading"
    UNLOADED = "unloaded"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Build:
    """One way to serve a model. `context_tokens` is for one request, prompt and completion together."""

    name: str
    triton_model: str
    triton_version: str
    triton_target: str
    engine: str
    quantization: str
    context_tokens: int
    state: BuildState
    parameters: int = 0
    on_demand: bool = False
    """Loaded when somebody asks for it; UNLOADED is no fault then."""
    lost_at_ms: int = 0
    """Unix time when it last failed while it served; 0 when it has not."""

    @property
    def is_ready(self) -> bool:
        return self.state is BuildState.READY


@dataclass(frozen=True, slots=True)
class Model:
    """A public alias with its builds by name. `created` is in Unix seconds."""

    alias: str
    kind: str
    description: str
    created: int
    stable_build: str
    builds: Mapping[str, Build]

    @property
    def context_tokens(self) -> int:
        """What every build can serve: the least of their contexts."""
        return min((b.context_tokens for b in self.builds.values()), default=0)

    @property
    def state(self) -> BuildState:
        """The best that any build is in: ready, loading, unloaded, unavailable."""
        states = {b.state for b in self.builds.values()}
        return next((s for s in BuildState if s in states), BuildState.UNAVAILABLE)

    @property
    def sleeper(self) -> Build | None:
        """The build to load before this model can serve: none when one is ready, or when none is on demand."""
        builds = list(self.builds.values())
        if any(b.is_ready for b in builds):
            return None
        asleep = [b for b in builds if b.on_demand]
        return next((b for b in asleep if b.name == self.stable_build), asleep[0] if asleep else None)


@dataclass(frozen=True, slots=True)
class Catalogue:
    models: Mapping[str, Model] = field(default_factory=dict)
    revision: int = 0


def fallback_chain(model: Model, wanted: str | None) -> tuple[Build, ...]:
    """The builds that may serve, best first: the wanted one, the stable one, then the others as the catalogue has them.

    Only what is ready. All of them cost the same: the price is the alias's.
    """
    names = dict.fromkeys((*((wanted,) if wanted else ()), model.stable_build, *model.builds))
    builds = (model.builds.get(name) for name in names)
    return tuple(b for b in builds if b is not None and b.is_ready)


def output_budget(asked: int | None, *, default: int, prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens may be generated. Raises InvalidRequest when the context cannot hold prompt and answer."""
    room = context_tokens - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        raise context_length_exceeded(prompt_tokens, asked, context_tokens)
    return min(default, room) if asked is None else asked
