"""Which build serves a model alias: the flag scheme, read through the OpenFeature API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode, ProviderNotReadyError
from openfeature.flag_evaluation import FlagEvaluationDetails, FlagValueType
from openfeature.provider.no_op_provider import NoOpProvider

from shared.flags.provider import FlagSettings, UnleashProvider
from shared.telemetry import get_logger

_log = get_logger(__name__)
_Details = FlagEvaluationDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]
_BUILD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
INVALID_PAYLOAD = "INVALID_PAYLOAD"


@dataclass(frozen=True, slots=True)
class BuildDecision:
    """What the flags say about one request.

    `build` is None where they name none (no state, no such flag, flag off, malformed payload): serve the catalogue's
    stable build. `allowed` is False only where the kill switch is known to be off: answer 503. `reason` is an
    OpenFeature reason or error code, or INVALID_PAYLOAD: few values, fit for a metric's label. `stale`: decided on
    flags that could not be refreshed.
    """

    build: str | None
    variant: str | None
    reason: str
    stale: bool
    allowed: bool


@dataclass(frozen=True, slots=True)
class FlagState:
    """For /readyz and metrics. `status`: not_ready, ready, stale or error.

    `age_s`: since Unleash last answered; infinite if it never did, so that no threshold takes that for fresh.
    """

    status: str
    age_s: float
    revision: str


class Flags:
    """One OpenFeature domain with its Unleash provider. `domain` tells instances in one process apart."""

    def __init__(self, settings: FlagSettings, domain: str = "tollgate") -> None:
        self._domain = domain
        self._provider = UnleashProvider(settings)
        self._client = api.get_client(domain)
        self._reported: dict[str, str] = {}

    async def start(self) -> None:
        """Begin polling. Returns normally when Unleash is down; raises ProviderFatalError for an unusable URL."""
        try:
            await asyncio.to_thread(api.set_provider_and_wait, self._provider, self._domain)
        except ProviderNotReadyError as e:
            _log.warning("no flags yet: stable builds are served", reason=e.error_message)

    async def close(self) -> None:
        """Stop polling; waits for a poll in flight, at most about twice the request timeout."""
        await asyncio.to_thread(self._provider.shutdown)
        api.set_provider_and_wait(NoOpProvider(), self._domain)

    def state(self) -> FlagState:
        return FlagState(self._provider.status.value.lower(), self._provider.age_s, self._provider.revision)

    def model_build(self, alias: str, *, user_id: str, org_id: str, plan: str, key_id: str) -> BuildDecision:
        """Evaluate `model.<alias>` once; `ops.<alias>.allowed` only when that names no build. No I/O, never raises."""
        context = EvaluationContext(user_id, {"org": org_id, "plan": plan, "key": key_id})
        details = self._client.get_object_details(f"model.{alias}", {}, context)
        if details.variant is not None:
            return self._chosen(details)
        if details.error_code in (ErrorCode.PARSE_ERROR, ErrorCode.TYPE_MISMATCH):
            self._report_malformed(details)
        return BuildDecision(
            build=None,
            variant=None,
            reason=str(details.error_code or details.reason),
            stale=self._provider.stale,
            allowed=self._allowed(alias, details, context),
        )

    def _chosen(self, details: _Details) -> BuildDecision:
        named = details.value.get("build") if isinstance(details.value, Mapping) else None
        build = named if isinstance(named, str) and _BUILD_NAME.fullmatch(named) else None
        if build is None:
            self._report_malformed(details)
        return BuildDecision(
            build=build,
            variant=details.variant,
            reason=str(details.reason) if build is not None else INVALID_PAYLOAD,
            stale=bool(details.flag_metadata.get("stale", True)),
            allowed=True,
        )

    def _allowed(
        self,
        alias: str,
        details: _Details,
        context: EvaluationContext,
    ) -> bool:
        """A kill switch that is off disables its child, which looks like a flag without a variant: ask which it is."""
        if details.error_code is ErrorCode.PROVIDER_NOT_READY:
            return True
        return self._client.get_boolean_value(f"ops.{alias}.allowed", True, context)

    def _report_malformed(self, details: _Details) -> None:
        """Once per flag and revision: the mistake is in Unleash, every request would repeat it."""
        revision = self._provider.revision
        if self._reported.get(details.flag_key) != revision:
            self._reported[details.flag_key] = revision
            _log.warning("flag payload names no build", flag=details.flag_key, variant=details.variant)
