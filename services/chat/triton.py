"""The engine, by Triton's streaming gRPC: the only module that knows Triton.

One call a request. `ModelStreamInfer` is bidirectional; opened as unary-stream (same bytes on the wire: one message,
then half-close) it needs no writer task. tritonclient's own client wraps every chunk in numpy arrays; its protobufs
alone are enough, and cost about 15 µs less a chunk.

Leaving. The engine is told, in a call of its own, to end the request, and what is left of its stream is read to the
end. Who leaves after the finish_reason has nothing to tell: the stream ends by itself, a message later, and no answer
waits for that. Cancelling the call would do the same, but tritonserver 2.51 may crash when a cancellation meets the end
of its stream (server#8034): one of some thousands does. It is left for streams without an end: of dead processes.

Failure modes. An engine error arrives as a reply's `error_message`, JSON {"code", "message"}; any other text there is
Triton's own (model not loaded, stub unhealthy). A server that dies breaks the call: UNAVAILABLE. A stub that dies
leaves the stream silent for ever: hence a limit on every silence, and a far shorter one once the catalogue says that
the build was lost meanwhile. A stream that ends without a finish_reason failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import grpc
import orjson
from grpc import aio
from tritonclient.grpc import service_pb2

from services.chat.domain.answers import engine_fields
from services.chat.domain.catalogue import Build
from services.chat.domain.request import ChatRequest, Limits
from services.chat.errors import engine_down, engine_failed, engine_silent, from_engine
from shared.errors import TollgateError
from shared.metering import Usage
from shared.telemetry import inject_trace

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
DEADLINE_MARGIN_S = 5.0  # the engine's own deadline comes first, with a better error
LENGTH_PREFIX = struct.Struct("<I")
LOOK_INTERVAL_S = 0.25  # how often a silence is looked at, so how late its end is noticed
SUSPICIOUS_SILENCE_S = 1.0
LEAVE_TIMEOUT_S = 2.0  # then the call is cancelled
LEAVE_AGAIN_S = 0.1  # the engine may be told before it has the request
CHUNKS_WAITING_MAX = 64

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


Lost = Callable[[], bool]
"""Whether the build was out of service at any time since the call began."""


class Chunk(NamedTuple):
    """One step of a generation: what was added, and the usage so far."""

    delta: Mapping[str, Any]
    finish_reason: str | None
    usage: Usage
    logprobs: Mapping[str, Any] | None = None


class TritonClient:
    """One channel to each Triton that the catalogue names."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._channels: dict[str, aio.Channel] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def count(self, build: Build, request: ChatRequest, *, lost: Lost) -> int:
        """Tokens of the prompt, as this build's template renders it. Raises TollgateError."""
        shown = {name: value for name, value in engine_fields(request).items() if name in ("tools", "tool_choice")}
        body = {"op": "count", **_asked(request), **shown}
        timeout_s = self._limits.count_timeout_s
        counted: int | None = None
        async with self._start(build, body, timeout_s, timeout_s, timeout_s, {}, lost) as replies:
            async for content in replies:
                counted = int(orjson.loads(content)["prompt_tokens"])
        if counted is None:
            raise engine_failed("no answer to a count")
        return counted

    def chat(
        self,
        build: Build,
        request: ChatRequest,
        *,
        max_tokens: int,
        tenant: str,
        lost: Lost,
        choice: int = 0,
        one_by_one: bool = False,
    ) -> Generation:
        """Start generating at most `max_tokens`. Use the result as an async context manager and iterator.

        `one_by_one` has each token come in a chunk of its own, for who may stop after any of them.
        """
        limits, body = self._limits, _body(request, max_tokens, choice)
        timeouts_s = limits.generation_timeout_s, limits.first_chunk_timeout_s, limits.chunk_timeout_s
        parameters: dict[str, int | str] = {"tg_tenant": tenant, "tg_priority": int(request.priority)}
        if one_by_one:
            parameters["tg_one_by_one"] = 1
        return Generation(self._start(build, body, *timeouts_s, parameters, lost))

    async def close(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving)
        for channel in self._channels.values():
            await channel.close(None)

    def _start(
        self,
        build: Build,
        body: Mapping[str, Any],
        timeout_s: float,
        first_timeout_s: float,
        silence_timeout_s: float,
        parameters: Mapping[str, int | str],
        lost: Lost,
    ) -> _Call:
        id_ = uuid.uuid4().hex

        def leave(call: _Call) -> None:
            task = asyncio.create_task(self._leave(build, id_, call))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

        opened = self._open(build, _request(build, id_, body, timeout_s, parameters), timeout_s + DEADLINE_MARGIN_S)
        return _Call(opened, first_timeout_s, silence_timeout_s, lost, leave)

    async def _leave(self, build: Build, id_: str, call: _Call) -> None:
        """Have a request ended: see the module. Never raises."""
        until_s = time.monotonic() + LEAVE_TIMEOUT_S
        while time.monotonic() < until_s:
            if not call.is_ending:
                asked = _request(build, "", {"op": "cancel", "request": id_}, LEAVE_TIMEOUT_S, {})
                with contextlib.suppress(aio.AioRpcError):
                    async for _ in self._open(build, asked, LEAVE_TIMEOUT_S):
                        pass
            if await call.has_ended(LEAVE_AGAIN_S):
                return
        call.break_off()

    def _open(self, build: Build, request: Any, timeout_s: float) -> aio.UnaryStreamCall[Any, Any]:
        channel = self._channels.get(build.triton_target)
        if channel is None:
            channel = aio.insecure_channel(build.triton_target, options=_OPTIONS)
            self._channels[build.triton_target] = channel
        method = channel.unary_stream(
            METHOD,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        metadata: dict[str, str] = {}
        inject_trace(metadata)
        return method(request, timeout=timeout_s, metadata=tuple(metadata.items()))


class Generation:
    """A generation under way: iterate over its chunks; leaving the block stops the engine."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    async def __aenter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call.cancel()

    def cancel(self) -> None:
        """Stop the engine; also of a generation that nobody iterates over."""
        self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk = _chunk(await self._call.__anext__())
        if chunk.finish_reason is not None:
            self._call.is_ending = True
        return chunk


class _Call:
    """Triton's replies as bytes; raises TollgateError for whatever goes wrong, silence included.

    A task of its own reads them, because a read that is cancelled cancels the call. Silence is watched by one timer a
    call: a time limit around each read would cost as much as the read itself.
    """

    def __init__(
        self,
        call: aio.UnaryStreamCall[Any, Any],
        first_timeout_s: float,
        timeout_s: float,
        lost: Lost,
        leave: Callable[[_Call], None],
    ) -> None:
        self.is_ending = False  # the engine has said that it will send nothing more
        self._call = call
        self._patience_s = first_timeout_s
        self._timeout_s = timeout_s
        self._lost = lost
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._contents: deque[bytes] = deque()
        self._failure: TollgateError | None = None
        self._is_left = False
        self._waiting: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._reading = self._loop.create_task(self._read())
        self._look_again()

    async def __aenter__(self) -> AsyncIterator[bytes]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Nobody wants the rest. Returns at once."""
        if self._is_left:
            return
        self._is_left = True
        self._timer.cancel()
        self._room.set()
        if not self._reading.done():
            self._leave(self)

    def break_off(self) -> None:
        """Cancel Triton's call."""
        self._call.cancel()

    async def has_ended(self, within_s: float) -> bool:
        """Whether the stream is read to its end, or will be by then."""
        done, _ = await asyncio.wait((self._reading,), timeout=within_s)
        return bool(done)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._contents:
            if self._failure is not None:
                raise self._failure
            if self._reading.done():
                raise StopAsyncIteration
            self._waiting = self._loop.create_future()
            await self._waiting
        if len(self._contents) == CHUNKS_WAITING_MAX:
            self._room.set()
        return self._contents.popleft()

    async def _read(self) -> None:
        """Read to the end; never raises."""
        try:
            async for reply in self._call:
                self._heard_s = self._loop.time()
                self._patience_s = self._timeout_s
                if self._is_left:
                    continue
                if reply.error_message:
                    self.is_ending = True
                    self._failure = _refused(reply.error_message)
                elif contents := reply.infer_response.raw_output_contents:  # the final reply is empty
                    self._contents.append(bytes(contents[0][LENGTH_PREFIX.size :]))
                    if len(self._contents) == CHUNKS_WAITING_MAX:
                        self._room.clear()
                self._wake()
                await self._room.wait()
        except aio.AioRpcError as e:
            self._failure = self._failure or _broken(e)
        except asyncio.CancelledError:
            self._failure = self._failure or engine_down("the call was cancelled")
        finally:
            self._loop.call_soon(self._wake)  # when this task is done

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(LOOK_INTERVAL_S, self._look)

    def _look(self) -> None:
        """End the call when it has been silent for too long."""
        silence_s = self._loop.time() - self._heard_s
        if self._reading.done():
            return
        if self._contents:  # it is the client that is slow
            self._heard_s = self._loop.time()
        elif silence_s >= self._patience_s:
            self._failure = engine_silent(f"nothing within {self._patience_s} s")
        elif silence_s >= SUSPICIOUS_SILENCE_S and self._lost():
            self._failure = engine_down("silent, and the build was lost meanwhile")
        if self._failure is None:
            self._look_again()
            return
        self._wake()


def _request(
    build: Build, id_: str, body: Mapping[str, Any], timeout_s: float, parameters: Mapping[str, int | str]
) -> Any:
    content = orjson.dumps(body)
    request = service_pb2.ModelInferRequest(model_name=build.triton_model, model_version=build.triton_version, id=id_)
    request.inputs.add(name="REQUEST", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(LENGTH_PREFIX.pack(len(content)) + content)
    request.parameters["timeout"].int64_param = int(timeout_s * 1_000_000)
    for name, value in parameters.items():
        if isinstance(value, int):
            request.parameters[name].int64_param = value
        else:
            request.parameters[name].string_param = value
    return request


def _body(request: ChatRequest, max_tokens: int, choice: int) -> dict[str, Any]:
    body = {
        "model": request.model,
        **_asked(request),
        "max_tokens": max_tokens,
        **request.sampling,
        **engine_fields(request),
    }
    if choice and "seed" in body:
        body["seed"] += choice  # the same seed would make the same choice again
    return body


def _asked(request: ChatRequest) -> dict[str, Any]:
    if request.prompt is not None:
        return {"prompt": request.prompt}
    return {"messages": [m.wire() for m in request.messages]}


def _chunk(content: bytes) -> Chunk:
    try:
        data = orjson.loads(content)
        choice, counted = data["choices"][0], data["usage"]
        usage = Usage(
            counted["prompt_tokens"],
            counted["prompt_tokens_details"]["cached_tokens"],
            counted["completion_tokens"],
        )
        return Chunk(choice["delta"], choice["finish_reason"], usage, choice.get("logprobs"))
    except (ValueError, LookupError, TypeError) as e:
        raise engine_failed(f"a chunk outside the contract: {type(e).__name__}") from e


def _refused(message: str) -> TollgateError:
    try:
        error = orjson.loads(message)
        return from_engine(str(error["code"]), str(error["message"]))
    except (ValueError, LookupError, TypeError):
        return engine_down(message)


def _broken(error: aio.AioRpcError) -> TollgateError:
    detail = f"{error.code().name}: {error.details()}"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return engine_silent(detail)
    return engine_down(detail)
