"""Triton as this service needs it: control of models and a question to one. The only tritonclient import here."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format, text_format
from grpc import aio
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.aio import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from services.inference.backend.request import CANARY_TENANT
from services.inference.errors import (
    BuildDead,
    BuildRefused,
    BuildSilent,
    LoadFailed,
    TritonError,
    TritonUnreachable,
)

REASON_CHARACTERS_MAX = 300
CANARY_PRIORITY = 0


class TritonServer:
    """One tritonserver over gRPC. Every call has a deadline."""

    def __init__(self, target: str, *, control_timeout_s: float, load_timeout_s: float) -> None:
        """`target` is host:port. Connects when first used, and again by itself. Close it in the end."""
        self.target = target
        self._client = InferenceServerClient(target)
        self._control_timeout_s = control_timeout_s
        self._load_timeout_s = load_timeout_s
        self._left: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        for task in self._left:
            task.cancel()
        await asyncio.gather(*self._left, return_exceptions=True)
        await self._client.close()

    async def is_loaded(self, build: str, version: str | None = None) -> bool:
        """Whether Triton calls the model (or that version of it) ready; that stays true after its process died.

        Raises TritonUnreachable.
        """
        try:
            return bool(await self._client.is_model_ready(build, version or "", client_timeout=self._control_timeout_s))
        except InferenceServerException as e:
            raise TritonUnreachable("Triton does not answer.") from e

    async def load(self, build: str, configuration: str | None = None) -> None:
        """Load, or reload when its files have changed; a no-op for a loaded build with unchanged files.

        `configuration` (JSON, see `pinned`) replaces config.pbtxt. Raises LoadFailed with Triton's reason;
        TritonUnreachable.
        """
        try:
            await self._client.load_model(build, config=configuration, client_timeout=self._load_timeout_s)
        except InferenceServerException as e:
            if e.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                raise TritonUnreachable(f"Triton does not answer to loading {build}.") from e
            raise LoadFailed(f"Loading failed: {_one_line(e.message())}") from e

    async def unload(self, build: str) -> None:
        """Unload; streams in flight finish. Raises TritonUnreachable."""
        try:
            await self._client.unload_model(build, client_timeout=self._control_timeout_s)
        except InferenceServerException as e:
            raise TritonUnreachable(f"Triton does not unload {build}.") from e

    async def parameters(self, build: str) -> dict[str, str]:
        """The `parameters` of the loaded build's configuration. Raises TritonUnreachable."""
        try:
            answer = await self._client.get_model_config(build, client_timeout=self._control_timeout_s)
        except InferenceServerException as e:
            raise TritonUnreachable(f"Triton does not tell the configuration of {build}.") from e
        return {name: value.string_value for name, value in answer.config.parameters.items()}

    async def ask(
        self,
        build: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        tenant: str = CANARY_TENANT,
        priority: int = CANARY_PRIORITY,
    ) -> list[dict[str, Any]]:
        """Send one request and collect what comes back until the stream ends.

        Cancelled, it has the build end the request; breaking the stream might crash the server (see
        backend/dispatcher.py).

        Raises BuildDead for an error of Triton's own, BuildSilent when that takes longer than `timeout_s`, BuildRefused
        for an error of the model's, TritonUnreachable.
        """
        id_, parameters = uuid.uuid4().hex, {"tg_priority": priority, "tg_tenant": tenant}
        asking = asyncio.create_task(self._collect(build, id_, body, timeout_s, parameters))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            told = asyncio.create_task(
                self._collect(build, "", {"op": "cancel", "request": id_}, self._control_timeout_s, {})
            )
            for task in (asking, told):
                self._left.add(task)
                task.add_done_callback(self._forget)
            raise

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # nobody waits for it

    async def _collect(
        self, build: str, id_: str, body: Mapping[str, Any], timeout_s: float, parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        requests = _requests(build, id_, body, timeout_s, parameters)
        stream = self._client.stream_infer(requests, stream_timeout=timeout_s)
        answers: list[dict[str, Any]] = []
        refusal: TritonError | None = None
        try:
            async for result, error in stream:
                if error is not None:
                    refusal = _refusal(error.message())
                elif result.get_response().outputs:
                    answers.append(json.loads(bytes(result.as_numpy("RESPONSE").reshape(-1)[0])))
        except (InferenceServerException, aio.AioRpcError) as e:  # a stream's own failures come unwrapped
            if isinstance(e, aio.AioRpcError) and e.code() is grpc.StatusCode.UNAVAILABLE:
                raise TritonUnreachable("Triton does not answer.") from e
            if refusal is None:
                raise BuildSilent(f"{build} did not answer within {timeout_s:g} s.") from e
        if refusal is not None:
            raise refusal
        if not answers:
            raise BuildSilent(f"{build} ended without an answer.")
        return answers


def parameters_in(configuration: Path) -> dict[str, str]:
    """The `parameters` of a config.pbtxt. Raises LoadFailed."""
    return {name: value.string_value for name, value in _configuration(configuration).parameters.items()}


def pinned(configuration: Path, version: str) -> str:
    """A config.pbtxt as JSON that serves one version only. Raises LoadFailed."""
    config = _configuration(configuration)
    config.version_policy.specific.versions[:] = [int(version)]
    return str(json_format.MessageToJson(config, preserving_proto_field_name=True))


def _configuration(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except OSError as e:
        raise LoadFailed(f"Loading failed: cannot read {path.name}: {e.strerror}.") from e
    except (text_format.ParseError, UnicodeDecodeError) as e:
        raise LoadFailed(f"Loading failed: {path.name}: {_one_line(str(e))}") from e


async def _requests(
    build: str, id_: str, body: Mapping[str, Any], timeout_s: float, parameters: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    tensor = InferInput("REQUEST", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([json.dumps(dict(body)).encode()], dtype=np.object_))
    yield {
        "model_name": build,
        "request_id": id_,
        "inputs": [tensor],
        "timeout": int(timeout_s * 1_000_000),
        "parameters": dict(parameters),
    }


def _refusal(message: str) -> TritonError:
    """An error of the model is JSON; Triton's own words mean that the request never reached it."""
    try:
        answer = json.loads(message)
        return BuildRefused(str(answer["code"]), str(answer["message"]))
    except (ValueError, KeyError, TypeError):
        return BuildDead(f"Triton says: {_one_line(message)}")


def _one_line(message: str) -> str:
    return " ".join(message.split())[:REASON_CHARACTERS_MAX]
