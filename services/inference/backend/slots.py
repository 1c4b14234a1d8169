"""Which of the engine's slots serves which request, so that a prompt cache is never shared between tenants.

A slot keeps the prompt that it computed last. A request gets, of the free slots, the one that has most of this
conversation from an earlier turn of the same tenant; else one next to those at work; else one that holds nothing; else
the one that has been idle for longest, without what it holds.

Next to those at work, because llama.cpp computes the tokens of neighbouring slots in one pass and others' in passes of
their own: four slots side by side made 230 tokens/s where four scattered over sixteen made 135.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BLOCK_CHARACTERS = 256

Fingerprint = tuple[int, ...]
"""A hash for each block of each message: two conversations have as many in common as they begin alike, also where a
long first message, a document, is followed by another question."""


class Lease(NamedTuple):
    """A slot for one request. `may_reuse`: what it holds is of the same tenant."""

    slot: int
    may_reuse: bool


@dataclass(slots=True)
class _Slot:
    tenant: str | None = None
    held: Fingerprint = ()
    used: int = field(default=0)


class SlotTable:
    """Safe from any thread. At most as many leases are out as there are slots: the caller's threads see to that."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._free = set(range(count))
        self._lock = threading.Lock()
        self._turn = 0

    def claim(self, tenant: str, conversation: Fingerprint) -> Lease:
        with self._lock:
            number = max(self._free, key=lambda n: self._worth(n, tenant, conversation))
            self._free.remove(number)
            slot = self._slots[number]
            may_reuse = slot.tenant == tenant
            self._turn += 1
            slot.tenant, slot.held, slot.used = tenant, conversation, self._turn
            return Lease(number, may_reuse)

    def give_back(self, lease: Lease) -> None:
        with self._lock:
            self._free.add(lease.slot)

    def _worth(self, number: int, tenant: str, conversation: Fingerprint) -> tuple[int, int, bool, int]:
        slot = self._slots[number]
        common = _common(slot.held, conversation) if slot.tenant == tenant else 0
        neighbours = sum(0 <= n < len(self._slots) and n not in self._free for n in (number - 1, number + 1))
        return common, neighbours, slot.tenant is None, -slot.used


def fingerprint(request: Mapping[str, Any]) -> Fingerprint:
    """Of the tools and the messages of a chat body, or of its prompt. Hashes are of this process only."""
    tools = request.get("tools")
    parts: Sequence[Any] = [*([tools] if tools else ()), *request.get("messages", (request.get("prompt"),))]
    texts = [json.dumps(part) for part in parts]
    return tuple(
        hash(text[at : at + BLOCK_CHARACTERS]) for text in texts for at in range(0, len(text), BLOCK_CHARACTERS)
    )


def _common(one: Fingerprint, other: Fingerprint) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
