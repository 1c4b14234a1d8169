"""A completion's request, the catalogue that serves it, and the rules between them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from services.chat.errors import context_length_exceeded

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit of this service; where they come from is settings.py."""

    max_tokens_default: int
    messages_max: int
    prompt_chars_max: int
    generations_max: int
    count_timeout_s: float
    first_chunk_timeout_s: float
    chunk_timeout_s: float
    generation_timeout_s: float
    send_timeout_s: float


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request. `max_tokens` None: the client set no limit of its own."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False


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


@dataclass(frozen=True, slots=True)
class Catalogue:
    models: Mapping[str, Model] = field(default_factory=dict)
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request cost. `settled_nano` None: the ledger has not answered yet; it settles later."""

    hold_id: str
    build: str
    held_nano: int
    settled_nano: int | None


def choose_build(model: Model, wanted: str | None) -> Build | None:
    """The wanted build when it is ready, else the stable one when that is, else None."""
    for name in (wanted, model.stable_build):
        build = model.builds.get(name) if name else None
        if build is not None and build.is_ready:
            return build
    return None


def output_budget(asked: int | None, *, default: int, prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens may be generated. Raises InvalidRequest when the context cannot hold prompt and answer."""
    room = context_tokens - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        raise context_length_exceeded(prompt_tokens, asked, context_tokens)
    return min(default, room) if asked is None else asked
