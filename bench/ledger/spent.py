"""What a load took of a PostgreSQL server: processor time, write-ahead log, waits for the disk."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

from deploy.local.postgres import Postgres

_LOG = """SELECT pg_current_wal_insert_lsn() - '0/0', (SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal')"""


@dataclass(frozen=True, slots=True)
class Spent:
    """In all, or between two looks. Backends report their fsyncs once a second."""

    cpu_s: float = 0.0
    wal_bytes: float = 0.0
    wal_fsyncs: float = 0.0

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.cpu_s - other.cpu_s, self.wal_bytes - other.wal_bytes, self.wal_fsyncs - other.wal_fsyncs)

    def each(self, operations: float) -> Spent:
        """Of one operation."""
        return Spent(*(value / max(operations, 1) for value in (self.cpu_s, self.wal_bytes, self.wal_fsyncs)))


def spent(postgres: Postgres) -> Spent:
    """Since the server started, by processes that have ended too."""
    wal_bytes, wal_fsyncs = postgres.execute(_LOG).strip().split("|")
    postmaster = psutil.Process(int((postgres.data / "postmaster.pid").read_text().split()[0]))
    ended = postmaster.cpu_times()
    cpu_s: float = ended.children_user + ended.children_system
    for process in postmaster.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu_s += sum(process.cpu_times()[:2])
    return Spent(cpu_s, float(wal_bytes), float(wal_fsyncs))
