"""What a completion tells, in order: Started, then Delta and Finished of each choice, then Settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.metering import Usage


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has begun to answer. `headers` belong to the response; `tier` is the service tier that serves."""

    build: str
    tier: str = "default"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to a choice's message. `logprobs` are those of its tokens, where they were asked for."""

    index: int
    fields: Mapping[str, Any]
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is complete."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request cost. `settled_nano` None: the ledger has not answered yet; it settles later.

    `limited_by` says what ended an answer with `length` before its own limit: `credits`, `budget`, `frozen` (the
    wallet) or `billing` (which could not be asked for more). `cached`: the answer came from the response cache.
    `available_nano` is what the wallet has left, where the ledger has said.
    """

    hold_id: str
    build: str
    held_nano: int
    settled_nano: int | None
    limited_by: str | None = None
    cached: bool = False
    available_nano: int | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The last event: what was used and what it cost."""

    usage: Usage
    receipt: Receipt


Event = Started | Delta | Finished | Settled
