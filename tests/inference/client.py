"""A client of the model contract, as close to the wire as it gets."""

import json
import struct
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

CALL_TIMEOUT_S = 120.0


class ModelError(Exception):
    """The JSON error of the model."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = str(json.loads(message)["code"])


class Stream:
    """One request and its chunks."""

    def __init__(self, call: Any, id_: str) -> None:
        self._call = call
        self.id = id_
        self.finished = False

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        async for answer in self._call:
            if answer.error_message:
                raise ModelError(answer.error_message)
            if answer.infer_response.raw_output_contents:
                # A string tensor: each element is its length in four bytes, then its content.
                yield json.loads(answer.infer_response.raw_output_contents[0][4:])
            if answer.infer_response.parameters["triton_final_response"].bool_param:
                self.finished = True

    async def all(self) -> list[dict[str, Any]]:
        """Everything up to the end."""
        return [chunk async for chunk in self]

    async def first(self, count: int) -> list[dict[str, Any]]:
        """The first chunks; the stream goes on."""
        chunks: list[dict[str, Any]] = []
        async for chunk in self:
            chunks.append(chunk)
            if len(chunks) == count:
                break
        return chunks

    def cancel(self) -> None:
        """Break the stream, as a caller that dies does."""
        self._call.cancel()


class BackendClient:
    """Requests to the builds of one tritonserver."""

    def __init__(self, target: str) -> None:
        self._channel = aio.insecure_channel(target)
        self.sent: Counter[str] = Counter()
        """Requests sent to each build."""
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(None)

    async def load(self, build: str) -> None:
        await self._stub.RepositoryModelLoad(
            service_pb2.RepositoryModelLoadRequest(model_name=build), timeout=CALL_TIMEOUT_S
        )

    async def unload(self, build: str) -> None:
        await self._stub.RepositoryModelUnload(
            service_pb2.RepositoryModelUnloadRequest(model_name=build), timeout=CALL_TIMEOUT_S
        )

    async def is_ready(self, build: str) -> bool:
        answer = await self._stub.ModelReady(service_pb2.ModelReadyRequest(name=build), timeout=CALL_TIMEOUT_S)
        return bool(answer.ready)

    def send(
        self,
        build: str,
        body: dict[str, Any] | bytes,
        *,
        priority: int = 2,
        tenant: str = "tests",
        timeout_s: float | None = None,
    ) -> Stream:
        """Send one request on a stream of its own."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = service_pb2.ModelInferRequest(model_name=build, id=uuid.uuid4().hex)
        request.inputs.add(name="REQUEST", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(raw)) + raw)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        request.parameters["tg_priority"].int64_param = priority
        request.parameters["tg_tenant"].string_param = tenant
        if timeout_s is not None:
            request.parameters["timeout"].int64_param = int(timeout_s * 1_000_000)
        self.sent[build] += 1
        call = self._stub.ModelStreamInfer(iter([request]), timeout=CALL_TIMEOUT_S)
        return Stream(call, request.id)

    async def cancel(self, build: str, stream: Stream) -> bool:
        """Have a request's stream ended, as a caller that lives does; whether the build knew of it."""
        [answer] = await self.send(build, {"op": "cancel", "request": stream.id}).all()
        return bool(answer["cancelled"])


def chat(text: str = "hello", *, tokens: int = 8, **more: Any) -> dict[str, Any]:
    """A chat body that generates exactly `tokens` tokens."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": 1,
        **more,
    }


def count(text: str) -> dict[str, Any]:
    return {**chat(text), "op": "count"}
