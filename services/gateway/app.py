"""Everything the gateway is made of, in the order in which it is made."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry

from services.gateway.access_log import AccessLog
from services.gateway.addresses import ClientAddresses, parse_networks
from services.gateway.admission import Admission
from services.gateway.cookies import BrowserCookies
from services.gateway.discovery import Discovery, static
from services.gateway.domain import Ceilings
from services.gateway.edge import Edge
from services.gateway.guesses import Guesses
from services.gateway.internal import InternalPages
from services.gateway.keys import KeyStore
from services.gateway.openapi import OpenApi
from services.gateway.pages import Pages
from services.gateway.protocol import EdgeProtocol
from services.gateway.relay import Cors, Relay, Timeouts
from services.gateway.replicas import PoolSettings, Upstream
from services.gateway.repository import KeyRepository
from services.gateway.sessions import SessionStore
from services.gateway.settings import GatewaySettings
from services.gateway.target import Targets
from services.gateway.tasks import Heartbeat, refresh_key_set, renew_leases
from services.gateway.tokens import AccessTokens, JsonWebKeySet
from services.gateway.upstreams import RouteTable
from services.gateway.usage import UsageEvents
from shared.apikeys import Peppers
from shared.clock import SystemClock
from shared.identity import IdentityRing
from shared.limits import ClusterLink, LocalLimiter, RedisLimiter, RedisLink, RedisUnavailable, create_link
from shared.limits.policy import HOUR_S
from shared.runtime import HttpServer, Service
from shared.telemetry import GatewayMetrics, HttpMetrics, new_registry
from shared.web import Readiness

SERVICE = "gateway"
VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class _Floor:
    """What the parts share."""

    clock: SystemClock
    registry: CollectorRegistry
    metrics: GatewayMetrics
    link: RedisLink | ClusterLink
    http_metrics: HttpMetrics
    addresses: ClientAddresses
    access_log: AccessLog
    upstreams: dict[str, Upstream]
    discovery: Discovery
    routes: RouteTable


async def build(settings: GatewaySettings, stack: AsyncExitStack, readiness: Readiness) -> Service:
    """Construct, connect, hand down. Starts without Redis, PostgreSQL or any service; they are tried again."""
    floor = _floor(settings, stack)
    await floor.discovery.look()
    repository = await stack.enter_async_context(
        KeyRepository(
            settings.gateway_database_url.get_secret_value(),
            connections_max=settings.gateway_database_connections_max,
            timeout_ms=settings.gateway_database_timeout_ms,
        )
    )
    guesses = Guesses(floor.clock, per_minute=settings.gateway_unknown_keys_per_minute)
    keys = _keys(settings, floor, repository, guesses)
    await stack.enter_async_context(floor.link)  # after everything that subscribes
    key_set = JsonWebKeySet(floor.upstreams["auth"], floor.clock, timeout_ms=settings.gateway_jwks_timeout_ms)
    limiter = RedisLimiter(floor.link, lease_ttl_s=settings.gateway_lease_ttl_s)
    admission = Admission(
        keys=keys,
        tokens=AccessTokens(key_set, floor.clock, guesses),
        sessions=SessionStore(repository, floor.link, floor.clock),
        browser_cookies=BrowserCookies(settings.public_url),
        limiter=limiter,
        local=LocalLimiter(floor.clock),
        local_addresses=LocalLimiter(floor.clock, longest_window_s=HOUR_S),
        clock=floor.clock,
        metrics=floor.metrics,
        user_limits=settings.user_limits,
        anonymous_limits=settings.anonymous_limits,
        ceilings=Ceilings(settings.user_ceiling, settings.organization_ceiling),
        weights=settings.gateway_weights,
        gateways=settings.gateway_replicas,
    )
    usage = UsageEvents(floor.link, floor.metrics, queue_max=settings.gateway_usage_queue_max)
    heartbeat = Heartbeat(
        floor.link,
        admission,
        floor.metrics,
        interval_s=settings.gateway_heartbeat_interval_s,
        ttl_s=settings.gateway_heartbeat_ttl_s,
    )
    _add_checks(readiness, floor, repository)
    pages = _pages(settings, floor, readiness)
    edge = Edge(
        pages=pages,
        access_log=floor.access_log,
        metrics=floor.http_metrics,
        addresses=floor.addresses,
        is_public_tls=settings.is_public_tls,
    )
    relay = _relay(settings, floor, admission, usage)
    stack.callback(relay.close)
    return Service(
        http=[
            HttpServer(edge, settings.gateway_listen, partial(EdgeProtocol, relay, Targets(floor.routes))),
            HttpServer(InternalPages(pages, floor.registry), settings.gateway_internal_listen),
        ],
        tasks={
            "heartbeat": heartbeat.run,
            "leases": lambda: renew_leases(limiter, settings.gateway_lease_ttl_s / 3),
            "jwks": lambda: refresh_key_set(key_set, settings.gateway_jwks_interval_s),
            "usage": usage.run,
            "services": lambda: floor.discovery.run(settings.gateway_services_interval_s),
        },
    )


def _floor(settings: GatewaySettings, stack: AsyncExitStack) -> _Floor:
    clock = SystemClock()
    registry = new_registry()
    link = create_link(
        settings.redis_url.get_secret_value(),
        client_name=SERVICE,
        timeout_ms=settings.gateway_redis_timeout_ms,
        pending_max=settings.gateway_redis_pending_max,
    )
    urls = {
        "auth": settings.auth_url,
        "billing": settings.billing_url,
        "chat": settings.chat_url,
        "inference": settings.inference_url,
    }
    metrics = GatewayMetrics(registry)
    pools = PoolSettings(
        connections_max=settings.gateway_replica_connections_max,
        connect_timeout_s=settings.gateway_connect_timeout_ms / 1000,
    )
    upstreams = {name: Upstream(name, static(url), clock, pools, metrics) for name, url in urls.items()}
    for upstream in upstreams.values():
        stack.callback(upstream.close)
    access_log = AccessLog(SERVICE, sample=settings.gateway_access_log_sample)
    stack.callback(access_log.flush)
    return _Floor(
        clock=clock,
        registry=registry,
        metrics=metrics,
        http_metrics=HttpMetrics(registry, SERVICE),
        addresses=ClientAddresses(parse_networks(settings.trusted_proxies)),
        access_log=access_log,
        link=link,
        upstreams=upstreams,
        discovery=Discovery(upstreams, urls, settings.gateway_services_file),
        routes=RouteTable(),
    )


def _keys(settings: GatewaySettings, floor: _Floor, repository: KeyRepository, guesses: Guesses) -> KeyStore:
    return KeyStore(
        peppers=Peppers(settings.api_key_peppers.get_secret_value()),
        repository=repository,
        link=floor.link,
        clock=floor.clock,
        metrics=floor.metrics,
        guesses=guesses,
        process_entries_max=settings.gateway_key_cache_entries_max,
        process_ttl_s=settings.gateway_key_cache_ttl_s,
        negative_entries_max=settings.gateway_negative_cache_entries_max,
        negative_ttl_s=settings.gateway_negative_cache_ttl_s,
    )


def _pages(settings: GatewaySettings, floor: _Floor, readiness: Readiness) -> Pages:
    openapi = OpenApi(
        upstreams=floor.upstreams,
        routes=floor.routes,
        public_url=settings.public_url,
        version=VERSION,
        clock=floor.clock,
    )
    return Pages(
        readiness=readiness, openapi=openapi, clock=floor.clock, readiness_ttl_s=settings.gateway_readiness_ttl_s
    )


def _relay(settings: GatewaySettings, floor: _Floor, admission: Admission, usage: UsageEvents) -> Relay:
    return Relay(
        upstreams=floor.upstreams,
        admission=admission,
        ring=IdentityRing(settings.identity_keys.get_secret_value(), floor.clock),
        usage=usage,
        access_log=floor.access_log,
        gateway_metrics=floor.metrics,
        http_metrics=floor.http_metrics,
        timeouts=Timeouts(
            first_byte_s=settings.gateway_first_byte_timeout_s,
            idle_s=settings.gateway_idle_timeout_s,
            total_s=settings.gateway_total_timeout_s,
            drain_idle_s=settings.gateway_drain_idle_s,
        ),
        cors=Cors(settings.gateway_cors_origins),
        addresses=floor.addresses,
        body_bytes_max=settings.gateway_body_bytes_max,
        gzip_bytes_min=settings.gateway_gzip_bytes_min,
        is_public_tls=settings.is_public_tls,
        tracing=settings.otlp_endpoint is not None,
    )


def _add_checks(readiness: Readiness, floor: _Floor, repository: KeyRepository) -> None:
    async def redis() -> None:
        await floor.link.call("PING")
        if not floor.link.up:
            raise RedisUnavailable("a part of the cluster does not answer")

    readiness.add("redis", redis)
    readiness.add("postgres", repository.ping)
    for name, upstream in floor.upstreams.items():
        readiness.add(name, partial(_reachable, upstream))


async def _reachable(upstream: Upstream) -> None:
    upstream.reachable()
