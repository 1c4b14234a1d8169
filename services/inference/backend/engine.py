"""What an adapter gives: the port between the backend and an inference engine."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol


class Usage(NamedTuple):
    """Tokens of one request so far. `prompt_tokens` is the whole prompt, its cached part included."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


OnChunk = Callable[[bytes, Usage], None]
"""Takes one chat.completion.chunk (JSON, `usage` inside) and the same usage as numbers; called in order."""

Cancelled = Callable[[], bool]
"""True once nobody wants the rest. Engines ask at least once a chunk and once a prefill batch."""


class Engine(Protocol):
    """One loaded model. Methods may be called from several threads at once; `close` after all others."""

    @property
    def context_tokens(self) -> int:
        """Prompt and completion tokens that one request may use together."""

    @property
    def slots(self) -> int:
        """Requests that are generated at the same time."""

    def generate(self, request: Mapping[str, Any], on_chunk: OnChunk, cancelled: Cancelled) -> None:
        """Generate until the model stops, a limit of the request is reached, or `cancelled()`.

        Raises BackendError (invalid_request, context_length_exceeded, engine_error).
        """

    def count(self, request: Mapping[str, Any]) -> int:
        """Tokens of the prompt as the chat template renders it. Needs no slot.

        Raises BackendError (invalid_request, engine_error).
        """

    def close(self) -> None:
        """Free the model's memory. Nothing may run."""
