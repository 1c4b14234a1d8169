"""What an adapter gives: the port between the backend and an inference engine."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from services.inference.backend.request import Op


class Usage(NamedTuple):
    """Tokens of one request so far. `prompt_tokens` is the whole prompt, its cached part included."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Chunk(NamedTuple):
    """One chat.completion.chunk in pieces: JSON without `usage` and the closing brace, and the usage so far.

    In a joinable chunk `text` is the inside of the JSON string `choices[0].delta.content` and nothing else
    was generated in it; otherwise everything is in `before`.
    """

    before: str
    text: str
    after: str
    usage: Usage
    joinable: bool

    def join(self, later: "Chunk") -> "Chunk | None":
        """Both as one chunk, when that changes no more than the number of chunks."""
        if not (self.joinable and later.joinable):
            return None
        return Chunk(self.before, self.text + later.text, later.after, later.usage, True)

    def render(self) -> bytes:
        """The JSON, `usage` last."""
        usage = self.usage
        return (
            f'{self.before}{self.text}{self.after},"usage":{{"prompt_tokens":{usage.prompt_tokens},'
            f'"completion_tokens":{usage.completion_tokens},'
            f'"total_tokens":{usage.prompt_tokens + usage.completion_tokens},'
            f'"prompt_tokens_details":{{"cached_tokens":{usage.cached_tokens}}}}}}}'
        ).encode()


OnChunk = Callable[[Chunk], None]
"""Takes the chunks of one request, in order."""

Cancelled = Callable[[], bool]
"""True once nobody wants the rest. Engines ask at least once a chunk and once a prefill batch; one that asks no more
is taken for hung (`engine_silence_ms`)."""


class Engine(Protocol):
    """One loaded model. Methods may be called from several threads at once; `close` after all others."""

    @property
    def context_tokens(self) -> int:
        """Prompt and completion tokens that one request may use together."""

    @property
    def slots(self) -> int:
        """Requests that are generated at the same time."""

    def generate(self, request: Mapping[str, Any], tenant: str, on_chunk: OnChunk, cancelled: Cancelled) -> bool:
        """Generate until the model stops or a limit of the request is reached: True; or until `cancelled()`: False.

        What is computed for one tenant never serves another: a shared prompt cache tells, by its speed and by
        `cached_tokens`, what others have asked. No text of the request becomes a control token.

        Raises BackendError (invalid_request, context_length_exceeded, engine_error).
        """

    def compute(self, op: Op, request: Mapping[str, Any]) -> bytes:
        """The answer of an embedding or rerank model, as JSON (see the package's docstring).

        Raises BackendError as `generate` does.
        """

    def count(self, request: Mapping[str, Any]) -> int:
        """Tokens of the prompt as the chat template renders it, or of the longest of several texts. Needs no slot.

        Raises BackendError (invalid_request, engine_error).
        """

    def close(self) -> None:
        """Free the model's memory. Nothing may run."""
