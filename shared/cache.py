"""Redis or Valkey: one place where clients are made, with a limit on every wait.

Keys that one script touches share the hash tag `{org_id}`, so that Redis Cluster works unchanged. A cluster has a URL
of its own kind, `redis+cluster://[user:password@]host:port[,host:port…]` (`rediss+cluster` with TLS): any of its nodes.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CLUSTER_SUFFIX = "+cluster"
DEFAULT_PORT = 6379


def create_redis(
    url: str,
    *,
    client_name: str,
    timeout_ms: int = 100,
    connect_timeout_ms: int = 500,
    connections_max: int = 64,
) -> Redis | RedisCluster:
    """A client that answers or fails within `timeout_ms`, and never retries on its own: a script may have run.

    Raises ValueError for a URL of no kind that is known.
    """
    if is_cluster(url):
        return create_cluster(
            url, client_name=client_name, timeout_ms=timeout_ms, connect_timeout_ms=connect_timeout_ms
        )
    return Redis.from_url(
        url,
        client_name=f"tollgate-{client_name}",
        socket_timeout=timeout_ms / 1000,
        socket_connect_timeout=connect_timeout_ms / 1000,
        socket_keepalive=True,
        health_check_interval=0,
        retry=Retry(NoBackoff(), 0),
        max_connections=connections_max,
    )


def is_cluster(url: str) -> bool:
    return url.partition("://")[0].endswith(CLUSTER_SUFFIX)


def create_cluster(url: str, *, client_name: str, timeout_ms: int, connect_timeout_ms: int) -> RedisCluster:
    """redis-py's client of a cluster. Raises ValueError for a port that is no number."""
    scheme, _, rest = url.partition("://")
    credentials, _, hosts = rest.partition("/")[0].rpartition("@")
    parts = urlsplit(f"//{credentials}@x")
    return RedisCluster(
        startup_nodes=[ClusterNode(*_host_and_port(host.strip())) for host in hosts.split(",")],
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        ssl=scheme.startswith("rediss"),
        client_name=f"tollgate-{client_name}",
        require_full_coverage=False,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=timeout_ms / 1000,
        socket_connect_timeout=connect_timeout_ms / 1000,
    )


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host else (port, DEFAULT_PORT)
