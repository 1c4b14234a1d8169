"""Redis or Valkey: one place where clients are made, with a limit on every wait.

Keys that one script touches share the hash tag `{org_id}`, so that Redis Cluster works unchanged.
"""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff


def create_redis(
    url: str,
    *,
    client_name: str,
    timeout_ms: int = 100,
    connect_timeout_ms: int = 500,
    connections_max: int = 64,
) -> Redis:
    """A client that answers or fails within `timeout_ms`, and never retries on its own: a script may have run."""
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
