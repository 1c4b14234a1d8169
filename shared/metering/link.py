"""The stream to the ledger: operations of one turn of the event loop share a message, and so do their answers.

A stream that breaks fails what is under way on it with Unavailable; the next operation opens another. Operations are
idempotent by their ids: whoever does not know what became of one sends it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

from grpc import aio

from shared.errors import Internal, Timeout, TollgateError, Unavailable, from_metadata
from shared.grpc import Caller, mapped
from shared.metering.types import MeteringLimits
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub

Kind = Literal["hold", "extend", "heartbeat", "settle", "void"]
TIMEOUT_CHECKS = 8  # in the time of one timeout


class Link:
    """One stream at a time, opened when it is first needed."""

    def __init__(self, caller: Caller, limits: MeteringLimits) -> None:
        self._caller = caller
        self._limits = limits
        self._method = LedgerStub(caller.channel).Operate
        self._number = 0
        self._answers: dict[int, tuple[asyncio.Future[Any], float]] = {}
        self._outgoing: list[pb.Operation] = []
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None

    def send(self, kind: Kind, request: Any) -> asyncio.Future[Any]:
        """The reply, to come within `call_timeout_s`. It raises TollgateError, and only that."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if len(self._answers) >= self._limits.operations_pending_max:
            answer.set_exception(Unavailable("Billing is overloaded. Retry.", code="billing_overloaded"))
            return answer
        self._number += 1
        self._answers[self._number] = answer, loop.time() + self._limits.call_timeout_s
        self._outgoing.append(pb.Operation(id=self._number, **{kind: request}))
        self._wake.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        if self._watch is None:
            self._watch = loop.call_later(self._limits.call_timeout_s / TIMEOUT_CHECKS, self._expire)
        return answer

    async def close(self) -> None:
        """Break the stream. What is under way fails."""
        if self._watch is not None:
            self._watch.cancel()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])

    async def _work(self) -> None:
        """Carry operations and answers until the stream breaks, then fail what is left."""
        error: TollgateError = Unavailable("Billing is not available right now. Retry.", code="billing_unavailable")
        try:
            stream = self._caller.stream(self._method)
            tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    broken = task.exception() if task.done() else None
                    if isinstance(broken, aio.AioRpcError):
                        error = mapped(broken)
            finally:
                stream.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except aio.UsageError as e:
            error = Unavailable("Billing is not available right now. Retry.", detail=str(e))
        finally:
            self._fail_all(error)

    async def _write(self, stream: Any) -> None:
        size = self._limits.message_operations_max
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outgoing:
                message = pb.OperateRequest(operations=self._outgoing[:size])
                del self._outgoing[:size]
                await stream.write(message)

    async def _read(self, stream: Any) -> None:
        async for message in stream:
            for reply in message.answers:
                answer, _ = self._answers.pop(reply.id, (None, 0.0))
                if answer is None or answer.done():
                    continue  # whoever asked has gone
                kind = reply.WhichOneof("reply")
                if kind == "error":
                    answer.set_exception(_error(reply.error))
                else:
                    answer.set_result(getattr(reply, kind))

    def _expire(self) -> None:
        """Fail what has waited too long: they wait in the order in which they were sent."""
        loop, self._watch = asyncio.get_running_loop(), None
        now = loop.time()
        for number, (answer, deadline) in list(self._answers.items()):
            if deadline > now:
                break
            del self._answers[number]
            _fail(answer, Timeout(detail="call_timeout_s is over"))
        if self._answers:
            self._watch = loop.call_later(self._limits.call_timeout_s / TIMEOUT_CHECKS, self._expire)

    def _fail_all(self, error: TollgateError) -> None:
        answers, self._answers = self._answers, {}
        self._outgoing.clear()
        for answer, _ in answers.values():
            _fail(answer, error)


def _fail(answer: asyncio.Future[Any], error: TollgateError) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # whoever asked may be gone: that is no fault


def _error(data: bytes) -> TollgateError:
    with contextlib.suppress(ValueError, KeyError):
        return from_metadata(data)
    return Internal(detail="an answer that cannot be read")
