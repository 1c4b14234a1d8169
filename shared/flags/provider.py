"""OpenFeature's provider contract over UnleashClient, by public hooks only.

State machine (events are emitted by the watch thread, so never before `initialize` has returned):

    initialize ──► READY  (first poll answered, or a backup was read)
               └─► ERROR  (neither; evaluations raise ProviderNotReadyError, polling goes on)
    ERROR, STALE ──► READY  on the next successful poll
    READY ──► STALE  after `stale_after_ms` without one, at once when only the backup is there

A poll succeeded when Unleash answered 304, or 200 with a flag set that parses.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEventDetails
from openfeature.exception import (
    FlagNotFoundError,
    ParseError,
    ProviderFatalError,
    ProviderNotReadyError,
    TypeMismatchError,
)
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
from openfeature.provider import AbstractProvider, Metadata, ProviderStatus
from requests import Response
from requests.exceptions import InvalidHeader, InvalidSchema, InvalidURL, MissingSchema
from UnleashClient.clients.unleash_client import UnleashClient
from UnleashClient.constants import FEATURES_URL
from UnleashClient.utils import InstanceAllowType

from shared.flags.store import Flag, FlagStore
from shared.telemetry import get_logger

_log = get_logger(__name__)
_T = TypeVar("_T")
_Payload = Mapping[str, Any]
_BASE_FIELDS = frozenset({"userId", "sessionId", "remoteAddress", "environment", "appName", "currentTime"})


@dataclass(frozen=True, slots=True)
class FlagSettings:
    """How to reach Unleash. `url` ends in `/api`; `token` is a client (backend) token; `backup` may be None."""

    url: str
    token: str = field(repr=False)
    app_name: str
    backup: Path | None
    refresh_interval_s: int = 2
    request_timeout_ms: int = 2_000
    stale_after_ms: int = 15_000
    watch_interval_ms: int = 250
    usage_interval_s: int = 60
    flag_set_bytes_max: int = 16 * 1024 * 1024


class UnleashProvider(AbstractProvider):
    """Evaluates Unleash's flags in this process.

    Raises, for the SDK to turn into the default value: ProviderNotReadyError without any state, FlagNotFoundError,
    TypeMismatchError, ParseError. `flag_metadata` carries `revision` and `stale`.
    """

    def __init__(self, settings: FlagSettings) -> None:
        super().__init__()
        self._stale_after_s = settings.stale_after_ms / 1000
        self._watch_interval_s = settings.watch_interval_ms / 1000
        self._flag_set_bytes_max = settings.flag_set_bytes_max
        self._announced = ProviderStatus.NOT_READY
        self._last_success = -math.inf
        self._last_failure = "no answer"
        self._closed = threading.Event()
        self._close_lock = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="flags-watch", daemon=True)
        # UnleashClient logs a traceback at every poll that fails; the transitions below say it once.
        logging.getLogger("UnleashClient").setLevel(logging.CRITICAL)
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._store = FlagStore(settings.backup, settings.flag_set_bytes_max, self._accepted)
        self._client = UnleashClient(
            url=settings.url,
            app_name=settings.app_name,
            environment=_environment(settings.token),
            instance_id=f"{socket.gethostname()}-{os.getpid()}",
            refresh_interval=settings.refresh_interval_s,
            metrics_interval=settings.usage_interval_s,
            request_timeout=settings.request_timeout_ms / 1000,  # type: ignore[arg-type]  # requests takes floats
            request_retries=0,
            custom_headers={"Authorization": settings.token},
            custom_options={"hooks": {"response": self._answered}},
            cache=self._store,
            verbose_log_level=logging.DEBUG,
            multiple_instance_mode=InstanceAllowType.SILENTLY_ALLOW,
            sdk_flavor="tollgate-openfeature",
            sdk_flavor_version="1",
        )
        if self._store.current is not None and self._store.current.flags.keys() != self._engine_flags():
            _log.warning("flag backup ignored", path=str(settings.backup), reason="the engine refused it")
            self._store.discard()

    def get_metadata(self) -> Metadata:
        return Metadata("unleash")

    @property
    def status(self) -> ProviderStatus:
        """As of now. NOT_READY before `initialize` and after `shutdown`; the events follow within a watch interval."""
        if self._announced is ProviderStatus.NOT_READY:
            return ProviderStatus.NOT_READY
        if self._store.current is None:
            return ProviderStatus.ERROR
        return ProviderStatus.STALE if self.stale else ProviderStatus.READY

    @property
    def age_s(self) -> float:
        """Seconds since Unleash last answered; infinite if it never did."""
        return time.monotonic() - self._last_success

    @property
    def stale(self) -> bool:
        return self.age_s > self._stale_after_s

    @property
    def revision(self) -> str:
        """Unleash's revision of the flag set in use; empty without one."""
        current = self._store.current
        return current.revision if current is not None else ""

    def initialize(self, evaluation_context: EvaluationContext) -> None:
        """Register and poll once, each at most the request timeout, then poll in the background.

        Raises ProviderNotReadyError when Unleash did not answer and there is no backup (polling goes on), and
        ProviderFatalError when URL or token cannot be used at all.
        """
        try:
            self._client.initialize_client()
        except (MissingSchema, InvalidSchema, InvalidHeader, InvalidURL) as e:
            raise ProviderFatalError(f"Unleash's URL or token cannot be used: {type(e).__name__}") from e
        known = self._store.current is not None
        self._announced = ProviderStatus.READY if known else ProviderStatus.ERROR
        self._watcher.start()
        if not known:
            raise ProviderNotReadyError("Unleash did not answer and there is no backup")

    def shutdown(self) -> None:
        """Stop polling and watching; waits for a poll in flight. Idempotent."""
        with self._close_lock:
            if self._closed.is_set():
                return
            self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._client.destroy()
        self._announced = ProviderStatus.NOT_READY

    # Freshness and state

    def _answered(self, response: Response, *_args: Any, **_options: Any) -> None:
        """requests' hook: sees every answer before its body is read. Runs in the polling thread."""
        if not urlsplit(response.url).path.endswith(FEATURES_URL):
            return
        if response.status_code == 304:
            self._last_success = time.monotonic()
        elif response.status_code != 200:
            self._last_failure = f"HTTP {response.status_code}"
        elif int(response.headers.get("Content-Length", 0)) > self._flag_set_bytes_max:
            self._last_failure = "answer too large"
            raise ValueError(self._last_failure)

    def _accepted(self, changed: list[str]) -> None:
        self._last_success = time.monotonic()
        if changed and self._announced is not ProviderStatus.NOT_READY:
            _log.info("flags changed", flags=changed, revision=self.revision)
            self.emit_provider_configuration_changed(
                ProviderEventDetails(flags_changed=changed, metadata={"revision": self.revision})
            )

    def _watch(self) -> None:
        while not self._closed.wait(self._watch_interval_s):
            status = self.status
            if status is self._announced:
                continue
            self._announced = status
            if status is ProviderStatus.READY:
                _log.info("flags fresh", revision=self.revision)
                self.emit_provider_ready(ProviderEventDetails(metadata={"revision": self.revision}))
            else:
                _log.warning("flags stale", reason=self._last_failure, revision=self.revision)
                self.emit_provider_stale(ProviderEventDetails(message=self._last_failure))
            self._last_failure = "no answer"

    def _engine_flags(self) -> set[str]:
        return set(self._client.feature_definitions())

    # Evaluation

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        flag = self._known(flag_key)
        loaded = True

        def not_loaded(_name: str, _context: Mapping[str, Any]) -> bool:
            nonlocal loaded
            loaded = False
            return False

        enabled = self._client.is_enabled(flag_key, _unleash_context(evaluation_context), not_loaded)
        if not loaded:
            raise FlagNotFoundError(f"{flag_key} is not loaded yet")
        decided = enabled or flag.reason in (Reason.DISABLED, Reason.SPLIT)
        return FlagResolutionDetails(
            enabled,
            reason=flag.reason if decided else Reason.DEFAULT,
            variant="on" if enabled else "off",
            flag_metadata=self._flag_metadata(),
        )

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        return self._variant(flag_key, default_value, _string, evaluation_context)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        return self._variant(flag_key, default_value, _integer, evaluation_context)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        return self._variant(flag_key, default_value, _float, evaluation_context)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        return self._variant(flag_key, default_value, _object, evaluation_context)

    def _variant(
        self,
        flag_key: str,
        default_value: _T,
        read: Callable[[_Payload], _T],
        context: EvaluationContext | None,
    ) -> FlagResolutionDetails[_T]:
        flag = self._known(flag_key)
        variant = self._client.get_variant(flag_key, _unleash_context(context))
        if not variant["enabled"]:
            reason = Reason.DISABLED if flag.reason is Reason.DISABLED else Reason.DEFAULT
            return FlagResolutionDetails(default_value, reason=reason, flag_metadata=self._flag_metadata())
        payload = variant.get("payload")
        if payload is None:
            raise TypeMismatchError(f"variant {variant['name']} of {flag_key} has no payload")
        return FlagResolutionDetails(
            read(payload), reason=flag.reason, variant=variant["name"], flag_metadata=self._flag_metadata()
        )

    def _known(self, flag_key: str) -> Flag:
        current = self._store.current
        if current is None:
            raise ProviderNotReadyError("no flag set yet")
        flag = current.flags.get(flag_key)
        if flag is None:
            raise FlagNotFoundError(f"no flag {flag_key}")
        return flag

    def _flag_metadata(self) -> dict[str, bool | int | float | str]:
        return {"revision": self.revision, "stale": self.stale}


def _environment(token: str) -> str:
    """`<project>:<environment>.<secret>` names the environment; other shapes do not."""
    _, colon, rest = token.partition(":")
    return rest.partition(".")[0] if colon else "default"


def _unleash_context(context: EvaluationContext | None) -> dict[str, Any]:
    """Unleash's own fields at the top, everything else under `properties`, all as text."""
    properties: dict[str, str] = {}
    result: dict[str, Any] = {"properties": properties}
    if context is None:
        return result
    for name, value in context.attributes.items():
        if value is None:
            continue
        if name in _BASE_FIELDS:
            result[name] = _text(value)
        else:
            properties[name] = _text(value)
    if context.targeting_key:
        result["userId"] = context.targeting_key
    return result


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(value, default=str)


def _string(payload: _Payload) -> str:
    if payload["type"] not in ("string", "csv"):
        raise TypeMismatchError(f"the payload is {payload['type']}, not string")
    return str(payload["value"])


def _integer(payload: _Payload) -> int:
    try:
        return int(_number(payload))
    except ValueError as e:
        raise TypeMismatchError("the number is no integer") from e


def _float(payload: _Payload) -> float:
    try:
        value = float(_number(payload))
    except ValueError as e:
        raise TypeMismatchError("the number cannot be read") from e
    if not math.isfinite(value):
        raise TypeMismatchError("the number is not finite")
    return value


def _number(payload: _Payload) -> str:
    if payload["type"] != "number":
        raise TypeMismatchError(f"the payload is {payload['type']}, not number")
    return str(payload["value"])


def _object(payload: _Payload) -> Sequence[FlagValueType] | Mapping[str, FlagValueType]:
    if payload["type"] != "json":
        raise TypeMismatchError(f"the payload is {payload['type']}, not json")
    try:
        value = json.loads(payload["value"])
    except (ValueError, RecursionError) as e:
        raise ParseError("the payload is not valid JSON") from e
    if not isinstance(value, dict | list):
        raise TypeMismatchError("the JSON payload is neither object nor array")
    return value
