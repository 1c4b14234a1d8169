"""Refusals and failures as the caller of the model sees them."""

import json
from typing import Literal

Code = Literal[
    "invalid_request",
    "context_length_exceeded",
    "queue_full",
    "deadline_exceeded",
    "cancelled",
    "engine_error",
]


class BackendError(Exception):
    """A request that ends without a result.

    `message` is a public sentence; `detail` goes to the server's log only.
    """

    def __init__(self, code: Code, message: str, detail: str = "") -> None:
        super().__init__(detail or message)
        self.code: Code = code
        self.message = message
        self.detail = detail

    def as_json(self) -> str:
        """The message of the TritonError."""
        return json.dumps({"code": self.code, "message": self.message})


def cancelled() -> BackendError:
    return BackendError("cancelled", "The request was cancelled.")


def deadline_exceeded() -> BackendError:
    return BackendError("deadline_exceeded", "The request did not finish before its deadline.")


def queue_full() -> BackendError:
    return BackendError("queue_full", "The model's queue is full. Try again later.")


def context_length_exceeded(prompt_tokens: int, context_tokens: int) -> BackendError:
    return BackendError(
        "context_length_exceeded",
        f"The prompt has {prompt_tokens} tokens; this model's context holds {context_tokens} tokens, "
        "prompt and completion together.",
    )


def engine_failed(detail: str) -> BackendError:
    return BackendError("engine_error", "The engine failed while serving the request.", detail)


def engine_hung(silence_s: float) -> BackendError:
    return BackendError("engine_error", "The engine stopped answering.", f"silent for {silence_s:.1f} s")
