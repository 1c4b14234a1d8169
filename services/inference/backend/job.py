"""One request on its way through the backend."""

from dataclasses import dataclass, field
from typing import Any, Literal

from services.inference.backend.engine import Chunk, Usage
from services.inference.backend.errors import BackendError, cancelled, deadline_exceeded
from services.inference.backend.request import Op

StopReason = Literal["cancelled", "deadline_exceeded"]


@dataclass(slots=True, eq=False)
class Job:
    """Moments are seconds on the monotonic clock.

    Written by one thread at a time: intake sets `op` and `request`, a worker `started_at`, the
    dispatcher `stop` and everything below it. Passing the job through a queue orders these writes.
    """

    sender: Any  # Triton's response sender; only the dispatcher may touch it
    body: bytes
    priority: int
    tenant: str
    received_at: float
    deadline: float | None
    id: str = ""
    """The caller's name for it, by which another request may cancel it."""
    one_by_one: bool = False
    """Whether its chunks are never joined."""
    op: Op = "chat"
    request: dict[str, Any] = field(default_factory=dict)
    started_at: float | None = None
    stop: StopReason | None = None
    """Why nobody wants the rest. The thread that has the job sees it and ends the job."""
    checked_at: float = 0.0
    """When Triton was last asked whether the caller is still there; first, when the dispatcher got the job."""
    pending: list[Chunk] = field(default_factory=list)
    """Chunks to be sent, not before `send_at`."""
    send_at: float = 0.0
    first_token_at: float | None = None
    usage: Usage = field(default_factory=Usage)
    ended: bool = False

    def is_stopped(self) -> bool:
        return self.stop is not None

    def stop_error(self) -> BackendError:
        """The error that ends a stopped job."""
        assert self.stop is not None
        return cancelled() if self.stop == "cancelled" else deadline_exceeded()
