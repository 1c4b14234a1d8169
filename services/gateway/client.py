"""The client's connection, as a relayed request needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from services.gateway.relayed import Relayed


class Client(Protocol):
    """See the module."""

    @property
    def peer(self) -> str:
        """The address at its other end."""

    def opening(self, status: int) -> bytes:
        """How every response with that status begins."""

    @property
    def write(self) -> Callable[[bytes], None]:
        """Sends."""

    def hold_reading(self, is_held: bool) -> None:
        """Read no more for now, or again."""

    def answered(self, exchange: Relayed, *, is_broken: bool) -> None:
        """A response has ended, or will never: go on with the next request, or hang up."""
