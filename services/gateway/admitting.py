"""The way in of a relayed request: its admission, then a connection to a replica of its service.

    begin ──Asking──► Redis's reply ──► judge ──► Admitted ──idle connection──► send
      └─────────────── a task ◄───────────┴──────────┴─ none: a task ───────────► send

A warm key on a warm connection costs no task: all are callbacks. What waits for anything else is the request's task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from services.gateway.admission import Admitted, Asking, Step
from services.gateway.exchange import Exchange
from shared.errors import Internal, TollgateError
from shared.limits import Lease, Question
from shared.telemetry import get_logger

if TYPE_CHECKING:
    from services.gateway.heads import RequestHead
    from services.gateway.known import Asked
    from services.gateway.pool import UpstreamConnection
    from services.gateway.relay import Relay
    from services.gateway.replicas import Replica
    from services.gateway.target import Target

log = get_logger(__name__)

DoneT = TypeVar("DoneT")


class Admitting(Exchange):
    """See the module. Until `_send` or `fail`, whichever comes."""

    response_complete = False
    is_whole = False  # the request's body is in
    _relay: Relay
    _asked: Asked
    _target: Target
    _head: RequestHead
    _limit_headers = b""
    _lease: Lease | None = None
    _replica: Replica | None = None
    _asking: Asking | None = None
    _task: asyncio.Task[None] | None = None

    def admit(self) -> None:
        """Begin. Not in this turn of the loop, unless the body is there: one that came with its head is read first,
        so that a refusal need not close the connection."""
        if self.is_whole:
            self._begin()
        else:
            self._relay.loop.call_soon(self._begin)

    def fail(self, error: TollgateError) -> None:
        """Answer with an error."""
        raise NotImplementedError

    def _send(self, connection: UpstreamConnection) -> None:
        """Send the request to the replica, as far as it is there."""
        raise NotImplementedError

    def _stop_admitting(self) -> None:
        if self._asking is not None:
            asking, self._asking = self._asking, None
            self._relay.admission.leave(asking)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self) -> None:
        if self.response_complete:
            return
        route, admission = self._target.route, self._relay.admission
        assert route is not None
        try:
            self._step(admission.begin(route, self.method, self._head, self.address, self._judge))
        except TollgateError as e:
            self.fail(e)
        except Exception:
            log.exception("request_crashed", request_id=self.request_id, endpoint=self.route)
            self.fail(Internal())

    def _judge(self, _: Question) -> None:
        asking, self._asking = self._asking, None
        if asking is None:
            return
        try:
            self._step(self._relay.admission.judge(asking))
        except TollgateError as e:
            self.fail(e)
        except Exception:
            log.exception("request_crashed", request_id=self.request_id, endpoint=self.route)
            self.fail(Internal())

    def _step(self, step: Step) -> None:
        if isinstance(step, Admitted):
            self.identity, self._limit_headers, self._lease = step
            if self._asked.cut is not None and self._head.asker is not None:
                self._relay.known_heads.remember(self._asked)
            upstream = self._relay.upstreams[self.service]
            if (taken := upstream.take()) is not None:
                self._sent_by(taken)
            else:
                self._wait(upstream.connect, self._sent_by)
        elif isinstance(step, Asking):
            self._asking = step
        else:
            self._wait(step, self._step)

    def _sent_by(self, taken: tuple[Replica, UpstreamConnection]) -> None:
        self._replica, connection = taken
        self._send(connection)

    def _wait(self, do: Callable[[], Awaitable[DoneT]], then: Callable[[DoneT], None]) -> None:
        self._task = self._relay.loop.create_task(self._waited(do, then))

    async def _waited(self, do: Callable[[], Awaitable[DoneT]], then: Callable[[DoneT], None]) -> None:
        try:
            done = await do()
            self._task = None
            then(done)
        except TollgateError as e:
            self._task = None
            self.fail(e)
        except Exception:
            self._task = None
            log.exception("request_crashed", request_id=self.request_id, endpoint=self.route)
            self.fail(Internal())
