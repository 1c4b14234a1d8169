"""A real Valkey Cluster of a test's own: three primaries with a replica each, on free ports."""

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from deploy.local.ports import pick_port
from tests.gateway.outages import valkey_binary

PRIMARIES, NODES, SLOTS = 3, 6, 16_384
DEADLINE_S = 60.0
PASSWORD = "p@ss/word"
OPTIONS = {
    "cluster-enabled": "yes",
    "cluster-node-timeout": "1000",
    "cluster-replica-validity-factor": "0",
    "repl-diskless-sync-delay": "0",
    "save": "",
    "appendonly": "no",
    "bind": "127.0.0.1",
    "requirepass": PASSWORD,
    "masterauth": PASSWORD,
}


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(RedisError, OSError):
            if condition():
                return
        assert time.monotonic() < end, f"not within {DEADLINE_S} s"
        time.sleep(0.02)


@dataclass
class Node:
    """One server."""

    directory: Path
    port: int
    bus_port: int
    process: subprocess.Popen[bytes] | None = None
    is_frozen: bool = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        options = [f for name, value in OPTIONS.items() for f in (f"--{name}", value)]
        own = ["--port", str(self.port), "--cluster-port", str(self.bus_port), "--dir", str(self.directory)]
        self.process = subprocess.Popen([valkey_binary(), *options, *own], stdout=subprocess.DEVNULL)

    def signal(self, signum: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(signum)
        self.is_frozen = signum == signal.SIGSTOP

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process, self.is_frozen = None, False

    def ask(self, *command: str | int | bytes) -> Any:
        with Redis(port=self.port, password=PASSWORD, socket_timeout=10, decode_responses=True) as client:
            return client.execute_command(*command)

    @property
    def is_primary(self) -> bool:
        return bool(self.ask("ROLE")[0] == "master")


class ValkeyCluster:
    """Six nodes; `url` names them all."""

    def __init__(self, directory: Path) -> None:
        self.nodes = []
        for i in range(NODES):
            own = directory / str(i)
            own.mkdir()
            self.nodes.append(Node(own, pick_port(), pick_port()))
        self.url = f"redis+cluster://:{quote(PASSWORD, safe='')}@" + ",".join(node.address for node in self.nodes)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            eventually(partial(node.ask, "PING"))
        first = self.nodes[0]
        for node in self.nodes[1:]:
            first.ask("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus_port)
        for i, node in enumerate(self.nodes[:PRIMARIES]):
            node.ask("CLUSTER", "ADDSLOTSRANGE", i * SLOTS // PRIMARIES, (i + 1) * SLOTS // PRIMARIES - 1)
        for node in self.nodes:
            eventually(partial(self.knows_all, node))
        for primary, replica in zip(self.nodes[:PRIMARIES], self.nodes[PRIMARIES:], strict=True):
            replica.ask("CLUSTER", "REPLICATE", primary.ask("CLUSTER", "MYID"))
        for node in self.nodes:
            eventually(partial(self.is_settled, node))

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()

    def knows_all(self, node: Node) -> bool:
        return f"cluster_known_nodes:{NODES}" in node.ask("CLUSTER", "INFO")

    def is_settled(self, node: Node) -> bool:
        """It sees a whole cluster, and if it is a replica, has all data."""
        role = node.ask("ROLE")
        return "cluster_state:ok" in node.ask("CLUSTER", "INFO") and (role[0] == "master" or role[3] == "connected")

    def primary_of(self, key: str) -> Node:
        """The node that serves a key, as the first living node sees it."""
        slot = key_slot(key.encode())
        for asked in (node for node in self.nodes if not node.is_frozen):
            with contextlib.suppress(RedisError, OSError):
                for begin, end, primary, *_ in asked.ask("CLUSTER", "SLOTS"):
                    if int(begin) <= slot <= int(end):
                        return next(n for n in self.nodes if n.port == int(primary[1]))
        raise AssertionError("nobody serves it")

    def replica_of(self, primary: Node) -> Node:
        port = str(primary.port)
        return next(n for n in self.nodes if n is not primary and str(n.ask("ROLE")[2]) == port)

    def move_slot(self, key: str, target: Node) -> None:
        """Move the slot of a key, with what is in it, step by step as an operator's tool does."""
        slot, source = key_slot(key.encode()), self.primary_of(key)
        source_id, target_id = source.ask("CLUSTER", "MYID"), target.ask("CLUSTER", "MYID")
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        while names := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1):
            source.ask("MIGRATE", "127.0.0.1", target.port, names[0], 0, 5_000, "AUTH", PASSWORD)
            time.sleep(0.02)
        for node in (target, source, *(n for n in self.nodes if n.process and n.is_primary)):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)


@contextmanager
def own_cluster() -> Iterator[ValkeyCluster]:
    directory = Path(tempfile.mkdtemp(prefix="tollgate-cluster-"))
    cluster = ValkeyCluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
