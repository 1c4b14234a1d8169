"""gRPC servers that misbehave on request: what the real engine, ledger and catalogue cannot be made to do at will.

They speak the real protocols on real sockets. The journeys drive the real ones.
"""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from shared.errors import PaymentRequired, TollgateError, to_metadata
from shared.rpc import billing_pb2, billing_pb2_grpc, inference_pb2, inference_pb2_grpc

LENGTH_PREFIX = struct.Struct("<I")
Item = dict[str, Any] | bytes | Exception
Script = Callable[[dict[str, Any]], AsyncIterator[Item]]


def chunk(content: str, completion_tokens: int, finish_reason: str | None = None, prompt_tokens: int = 7) -> Item:
    """A chat.completion.chunk of the engine contract."""
    return {
        "choices": [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish_reason}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


class EngineError(Exception):
    """A TritonError of the contract."""

    def __init__(self, code: str, message: str = "A public sentence.") -> None:
        super().__init__(json.dumps({"code": code, "message": message}))


async def three_words(request: dict[str, Any]) -> AsyncIterator[Item]:
    """The well-behaved engine."""
    del request
    yield chunk("", 0)
    for i, word in enumerate(("one", " two", " three"), 1):
        yield chunk(word, i)
    yield chunk("", 3, "stop")


async def for_ever(_: dict[str, Any]) -> AsyncIterator[Item]:
    """Never a word."""
    await asyncio.Event().wait()
    yield b""


class Engine(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # tritonclient has no types
    """Triton's stream. `chat` and `count` say what it answers; `sent` counts replies.

    A request that is cancelled by another one sets `stopped`; a stream that is broken sets `broken`. With `is_dead` the
    engine takes no word any more.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[None]] = {}
        self.reset()

    def reset(self) -> None:
        self.chat: Script = three_words
        self.count: Script = self.count_seven
        self.by_build: dict[str, Script] = {}
        self.requests: list[dict[str, Any]] = []
        self.builds: list[str] = []
        self.parameters: list[dict[str, Any]] = []
        self.metadata: list[dict[str, Any]] = []
        self.sent = 0
        self.is_dead = False
        self.begun = asyncio.Event()
        self.stopped = asyncio.Event()
        self.broken = asyncio.Event()

    @property
    def generated(self) -> list[dict[str, Any]]:
        """What was asked for, without counts."""
        return [r for r in self.requests if r.get("op") != "count"]

    async def is_idle(self) -> bool:
        """Whether nothing is generated."""
        return not self._running

    @staticmethod
    async def count_seven(_: dict[str, Any]) -> AsyncIterator[Item]:
        yield {"prompt_tokens": 7, "context_tokens": 100}

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            content = request.raw_input_contents[0]
            assert len(content) == LENGTH_PREFIX.unpack_from(content)[0] + LENGTH_PREFIX.size
            body = json.loads(content[LENGTH_PREFIX.size :])
            if body.get("op") == "cancel":
                yield await self._cancel(body["request"])
                return
            self.metadata.append(dict(context.invocation_metadata()))
            self.requests.append(body)
            self.builds.append(request.model_name)
            self.parameters.append({k: v.int64_param or v.string_param for k, v in request.parameters.items()})
            chat = self.by_build.get(request.model_name, self.chat)
            script = self.count if body.get("op") == "count" else chat
            self.begun.set()
            async for item in self._until_cancelled(request.id, script(body)):
                yield _reply(item)
                self.sent += 1

    async def _until_cancelled(self, id_: str, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        cancelled = self._running[id_] = asyncio.get_running_loop().create_future()
        try:
            while True:
                coming = asyncio.ensure_future(anext(items, None))
                try:
                    await asyncio.wait((coming, cancelled), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not coming.done():
                        coming.cancel()
                        await asyncio.wait((coming,))
                if cancelled.done():
                    self.stopped.set()
                    yield EngineError("cancelled")
                    return
                if (item := coming.result()) is None:
                    return
                yield item
        except (asyncio.CancelledError, GeneratorExit):  # while waiting, or while sending
            self.broken.set()
            raise
        finally:
            del self._running[id_]

    async def _cancel(self, id_: str) -> Any:
        if self.is_dead:
            await asyncio.Event().wait()
        if (found := self._running.get(id_)) is not None and not found.done():
            found.set_result(None)
        return _reply({"cancelled": found is not None})


def _reply(item: Item) -> Any:
    if isinstance(item, Exception):
        return service_pb2.ModelStreamInferResponse(error_message=str(item))
    content = item if isinstance(item, bytes) else json.dumps(item).encode()
    reply = service_pb2.ModelStreamInferResponse()
    reply.infer_response.raw_output_contents.append(LENGTH_PREFIX.pack(len(content)) + content)
    return reply


class Ledger(billing_pb2_grpc.LedgerServicer):
    """A ledger that remembers. A token costs one nano-credit; `refusal` is raised by Hold, `outage` by resolutions."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.holds: list[Any] = []
        self.settled: list[Any] = []
        self.voided: list[Any] = []
        self.covered: int | None = None
        self.available_nano = 0
        self.placing: asyncio.Event | None = None
        self.refusal: TollgateError | None = None
        self.outage: TollgateError | None = None
        self.prices_outage: TollgateError | None = None
        self.resolved = asyncio.Event()

    async def is_quiet(self) -> bool:
        """Whether every hold is settled or voided."""
        return {h.hold_id for h in self.holds} <= {r.hold_id for r in (*self.settled, *self.voided)}

    async def Hold(self, request: Any, _: Any) -> Any:
        if self.placing is not None:
            await self.placing.wait()
        if self.refusal is not None:
            raise self.refusal
        tokens = request.worst_case.output_tokens
        if self.covered is not None and tokens > self.covered:
            if not request.clamp:
                raise PaymentRequired()
            tokens = self.covered
        self.holds.append(request)
        return billing_pb2.HoldReply(
            hold_id=request.hold_id, amount_nano=tokens + request.worst_case.input_tokens, output_tokens=tokens
        )

    async def Extend(self, request: Any, _: Any) -> Any:
        if self.covered is not None:
            raise PaymentRequired()
        return billing_pb2.ExtendReply(hold_id=request.hold_id, output_tokens=request.output_tokens)

    async def Settle(self, request: Any, _: Any) -> Any:
        if self.outage is not None:
            raise self.outage
        self.settled.append(request)
        self.resolved.set()
        cost = request.usage.input_tokens + request.usage.output_tokens
        return billing_pb2.SettleReply(cost_nano=cost, settled_nano=cost, available_nano=self.available_nano)

    async def Void(self, request: Any, _: Any) -> Any:
        self.voided.append(request)
        self.resolved.set()
        return billing_pb2.VoidReply()

    async def Operate(self, requests: Any, context: Any) -> None:
        """The operations of a stream, each answered when it is done."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        reading = asyncio.create_task(self._read(requests, answers))
        try:
            while True:
                await context.write(billing_pb2.OperateReply(answers=[await answers.get()]))
        finally:
            reading.cancel()

    async def _read(self, requests: Any, answers: asyncio.Queue[Any]) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for request in requests:
                for operation in request.operations:
                    tasks.create_task(self._operate(operation, answers))

    async def _operate(self, operation: Any, answers: asyncio.Queue[Any]) -> None:
        name = operation.WhichOneof("request")
        try:
            made = {name: await getattr(self, name.capitalize())(getattr(operation, name), None)}
        except TollgateError as e:
            made = {"error": to_metadata(e)}
        answers.put_nowait(billing_pb2.Answer(id=operation.id, **made))

    async def Heartbeat(self, _request: Any, _: Any) -> Any:
        return billing_pb2.HeartbeatReply()

    async def ListPrices(self, _request: Any, _: Any) -> Any:
        if self.prices_outage is not None:
            raise self.prices_outage
        return billing_pb2.ListPricesReply(
            prices=[
                billing_pb2.Price(
                    price_id="p1",
                    model="small",
                    input_nano_per_million=1_500_000_000,
                    cached_input_nano_per_million=500_000_000,
                    output_nano_per_million=2_000_000_000,
                )
            ]
        )


class CatalogueDouble(inference_pb2_grpc.CatalogueServicer):
    """Two models: `small` with two builds, both on the engine's address, and `asleep`, which is loading or `asleep_is`.

    `lost` names builds that are out of service, `lost_at_ms` when they last were. With `has_more` there are `dozing`,
    which is loaded when it is asked for, and `vectors`, which does not chat.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self.lost: set[str] = set()
        self.lost_at_ms: dict[str, int] = {}
        self.has_more = False
        self.is_awake = False
        self.asleep_is: Any = inference_pb2.BUILD_STATE_LOADING

    async def List(self, _request: Any, _: Any) -> Any:
        small = inference_pb2.Model(alias="small", kind="chat", created=1, stable_build="small-a", description="Small.")
        for name, context in (("small-a", 100), ("small-b", 90)):
            state = inference_pb2.BUILD_STATE_UNAVAILABLE if name in self.lost else inference_pb2.BUILD_STATE_READY
            small.builds.append(self._build(name, context, state))
        asleep = inference_pb2.Model(alias="asleep", kind="chat", created=1, stable_build="asleep-a")
        asleep.builds.append(self._build("asleep-a", 100, self.asleep_is))
        more = self._more() if self.has_more else []
        return inference_pb2.ListReply(models=[small, asleep, *more], revision=1)

    async def Ensure(self, request: Any, _: Any) -> Any:
        assert request.build == "dozing-a"
        self.is_awake = True
        return self._build("dozing-a", 100, inference_pb2.BUILD_STATE_READY)

    def _more(self) -> list[Any]:
        dozing = inference_pb2.Model(alias="dozing", kind="chat", created=1, stable_build="dozing-a")
        state = inference_pb2.BUILD_STATE_READY if self.is_awake else inference_pb2.BUILD_STATE_UNLOADED
        dozing.builds.append(self._build("dozing-a", 100, state))
        dozing.builds[0].on_demand = True
        vectors = inference_pb2.Model(alias="vectors", kind="embedding", created=1, stable_build="vectors-a")
        vectors.builds.append(self._build("vectors-a", 100, inference_pb2.BUILD_STATE_READY))
        return [dozing, vectors]

    def _build(self, name: str, context_tokens: int, state: Any) -> Any:
        return inference_pb2.Build(
            name=name,
            triton_model=name,
            triton_target=self._target,
            context_tokens=context_tokens,
            state=state,
            lost_at_ms=self.lost_at_ms.get(name, 0),
        )


async def listen(server: aio.Server) -> str:
    """Start a server on a free port; its address."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return f"127.0.0.1:{port}"
