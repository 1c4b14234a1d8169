"""Models and their builds, and which of them serves a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from services.chat.errors import context_length_exceeded


class BuildState(Enum):
    READY = "ready"
    LOADING = "loading"
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
        """Ready when any build is; else loading when any is."""
        states = {b.state for b in self.builds.values()}
        return next((s for s in (BuildState.READY, BuildState.LOADING) if s in states), BuildState.UNAVAILABLE)


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
