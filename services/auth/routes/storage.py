"""A database that is away or too busy is an honest 503; a fault of a statement stays the 500 that it is."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from services.auth.errors import StorageUnavailable
from shared.database import ERRORS, is_temporary
from shared.telemetry import get_logger

log = get_logger(__name__)

RETRY_AFTER_S = 1


def add_to(app: FastAPI) -> None:
    """Have the application answer 503 `storage_unavailable` for these."""
    for kind in ERRORS:
        app.add_exception_handler(kind, _refuse)


async def _refuse(request: Request, error: Exception) -> Response:
    if not is_temporary(error):
        raise error
    log.warning("request_failed", code=StorageUnavailable.default_code, detail=type(error).__name__)
    raise StorageUnavailable(retry_after_s=RETRY_AFTER_S) from error
