"""Billing, constructed in order."""

from __future__ import annotations

from contextlib import AsyncExitStack

from services.billing.clients import GrpcPeers
from services.billing.ledger.shards import ShardLimits, Shards
from services.billing.ledger.writer import WriterLimits
from services.billing.partitions import PartitionMaker
from services.billing.reconciler import Reconciler, ReconcilerLimits
from services.billing.repository.database import Database, DatabaseLimits
from services.billing.service import Prices
from services.billing.servicer import Servicer
from services.billing.settings import BillingSettings
from services.billing.storefront import open_storefront
from services.billing.tasks import Gauges, Sweeper
from shared import grpc, web
from shared.clock import SystemClock
from shared.identity import IdentityRing
from shared.rpc.billing_pb2_grpc import add_LedgerServicer_to_server
from shared.runtime import HttpServer, Service
from shared.telemetry import BillingMetrics, GrpcMetrics, new_registry
from shared.web import Readiness


async def build(settings: BillingSettings, stack: AsyncExitStack, readiness: Readiness) -> Service:
    """Construct the service; the stack closes what was opened, in reverse order."""
    ring = IdentityRing(settings.identity_keys.get_secret_value(), SystemClock())
    registry = new_registry()
    metrics = BillingMetrics(registry)

    limits = DatabaseLimits(
        connections_max=settings.billing_database_connections_max,
        acquire_timeout_s=settings.billing_database_acquire_timeout_s,
    )
    url = settings.billing_database_url.get_secret_value()
    database = await stack.enter_async_context(Database(url, limits))
    readiness.add("postgres", database.ping)

    ledger = _open_ledger(settings, database, ring, metrics, stack)
    readiness.add("ledger", ledger.check)

    app = web.create_app(
        "billing", ring=ring, registry=registry, readiness=readiness, description="Wallets, prices and the ledger."
    )
    tasks = open_storefront(app, settings, database, ledger, metrics, stack)

    server = grpc.create_server(ring, GrpcMetrics(registry, "billing"))
    add_LedgerServicer_to_server(Servicer(ledger, Prices(database), readiness), server)

    sweeper = Sweeper(
        database,
        ledger,
        metrics,
        interval_s=settings.billing_sweep_interval_s,
        batch_max=settings.billing_sweep_batch_max,
        hold_grace_s=settings.billing_hold_grace_s,
    )
    gauges = Gauges(database, metrics, interval_s=settings.billing_gauges_interval_s)
    reconciler_limits = ReconcilerLimits(
        interval_s=settings.billing_reconcile_interval_s,
        transfers_max=settings.billing_reconcile_transfers_max,
        holds_max=settings.billing_reconcile_holds_max,
    )
    reconciler = Reconciler(database, metrics, reconciler_limits)
    partitions = PartitionMaker(
        database,
        metrics,
        months_ahead=settings.billing_partition_months_ahead,
        interval_s=settings.billing_partition_interval_s,
    )
    return Service(
        http=[HttpServer(app, settings.billing_http_listen)],
        grpc=server,
        grpc_listen=settings.billing_grpc_listen,
        tasks={
            "ledger": ledger.run,
            "sweeper": sweeper.run,
            "gauges": gauges.run,
            "reconciler": reconciler.run,
            "partitions": partitions.run,
            **tasks,
        },
    )


def _open_ledger(
    settings: BillingSettings, database: Database, ring: IdentityRing, metrics: BillingMetrics, stack: AsyncExitStack
) -> Shards:
    writer_limits = WriterLimits(
        operation_timeout_s=settings.billing_operation_timeout_s,
        operations_in_flight_max=settings.billing_operations_in_flight_max,
        wallets_in_memory_max=settings.billing_wallets_in_memory_max // settings.billing_shards + 1,
    )
    peers = GrpcPeers(ring, timeout_s=settings.billing_operation_timeout_s)
    stack.push_async_callback(peers.close)
    return Shards(
        database,
        settings.billing_database_url.get_secret_value(),
        peers,
        address=settings.grpc_address,
        signup_credits=settings.signup_nano,
        metrics=metrics,
        limits=ShardLimits(shards=settings.billing_shards),
        writer_limits=writer_limits,
    )
