"""How much memory a build needs, and how much the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.inference.backend.gguf import GgufInvalid, read_head
from services.inference.domain import Build
from services.inference.errors import LoadFailed

PROCESS_BYTES = 96 << 20  # the stub, its Python and the engine's work space for a small model
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `available` is what programs may still take before the machine swaps or kills."""

    total: int
    available: int

    def room(self, share_max: float) -> int:
        """What may be taken until `share_max` of everything is in use."""
        return int(share_max * self.total) - (self.total - self.available)


def machine_memory() -> Memory:
    """Of the machine, or of the container that this process is in when that has less. Raises OSError."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    machine = Memory(*(int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable")))
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return machine  # no limit ("max"), or no control group of ours
    reclaimable = int(stat.get("inactive_file", 0))
    return min(machine, Memory(limit, limit - used + reclaimable), key=lambda memory: memory.available)


def needed_bytes(weights: Path, build: Build) -> int:
    """Weights, KV cache of every slot, and the process. Raises LoadFailed for a file that is no whole model."""
    try:
        head = read_head(weights)
        cache = head.kv_bytes_per_token() * build.context_tokens * build.slots
    except GgufInvalid as e:
        raise LoadFailed(f"Loading failed: {weights.name}: {e}") from e
    except OSError as e:
        raise LoadFailed(f"Loading failed: cannot read {weights.name}: {e.strerror}.") from e
    return head.file_bytes + cache + PROCESS_BYTES


def mib(size: int) -> str:
    """For people."""
    return f"{size / (1 << 20):,.0f} MiB"
