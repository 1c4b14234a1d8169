"""A database that is away or too busy is an honest 503; a fault of a statement stays the 500 that it is."""

from __future__ import annotations

import asyncpg
from fastapi import FastAPI, Request, Response
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from services.auth.errors import StorageUnavailable
from shared.telemetry import get_logger

log = get_logger(__name__)

RETRY_AFTER_S = 1
# What PostgreSQL says when the same may succeed later (its manual's appendix A): connections, resources, shutdown; then
# a statement or a lock that took too long, a deadlock, a serialization failure.
TEMPORARY_CLASSES = ("08", "53", "57P")
TEMPORARY_STATES = ("57014", "55P03", "40P01", "40001")
# From the pools and the drivers: no connection could be had, or the one at hand broke off.
LOST = (PoolTimeout, ConnectionError, TimeoutError, asyncpg.InterfaceError)
ERRORS = (*LOST, DBAPIError, asyncpg.PostgresError)


def add_to(app: FastAPI) -> None:
    """Have the application answer 503 `storage_unavailable` for these."""
    for kind in ERRORS:
        app.add_exception_handler(kind, _refuse)


def is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, LOST) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    state = getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None) or ""
    return state in TEMPORARY_STATES or state.startswith(TEMPORARY_CLASSES)


async def _refuse(request: Request, error: Exception) -> Response:
    if not is_temporary(error):
        raise error
    log.warning("request_failed", code=StorageUnavailable.default_code, detail=type(error).__name__)
    raise StorageUnavailable(retry_after_s=RETRY_AFTER_S) from error
