"""What is kept of a conversation, and how lists of it are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Kind = Literal["completion", "response", "message"]
Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A completion with its conversation. `document` is the answer as it was sent; `messages` is what was asked."""

    id: str
    kind: Kind
    org_id: str
    user_id: str
    key_id: str
    model: str
    build: str
    created_at: datetime
    messages: Sequence[Mapping[str, Any]]
    document: Mapping[str, Any]
    metadata: Mapping[str, str]
    input_tokens: int
    output_tokens: int
    settled_nano: int | None
    duration_ms: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A page of a list: of one kind, filtered, after the entry named by `after`."""

    kind: Kind
    limit: int
    after: str | None = None
    order: Order = "desc"
    model: str | None = None
    user_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one user asked of one model, of what is kept."""

    user_id: str
    model: str
    completions: int
    input_tokens: int
    output_tokens: int
    settled_nano: int
    mean_duration_ms: int
