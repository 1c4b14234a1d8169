"""Billing's other processes, by gRPC: operations go to the one that leads the wallet's shard."""

from __future__ import annotations

from services.billing.errors import REFUSALS_BY_CODE
from services.billing.ledger import wire
from services.billing.ledger.operations import Operation
from services.billing.ledger.results import Result
from shared.errors import TollgateError
from shared.grpc import Caller
from shared.identity import IdentityRing
from shared.rpc import billing_pb2 as pb
from shared.rpc.billing_pb2_grpc import LedgerStub

SERVICE = "billing"


class GrpcPeers:
    """A channel to each address that was ever asked for; they are few, and named by the database alone."""

    def __init__(self, ring: IdentityRing, *, timeout_s: float) -> None:
        self._ring = ring
        self._timeout_s = timeout_s
        self._callers: dict[str, Caller] = {}

    async def forward(self, address: str, operation: Operation) -> Result:
        """See `services.billing.ledger.shards.Peers`."""
        caller = self._callers.get(address)
        if caller is None:
            caller = self._callers[address] = Caller(address, self._ring, service=SERVICE)
        request = pb.ForwardRequest(operation=wire.operation_to_bytes(operation))
        try:
            reply = await caller.call(LedgerStub(caller.channel).Forward, request, timeout_s=self._timeout_s)
        except TollgateError as e:
            if e.code in REFUSALS_BY_CODE:
                raise REFUSALS_BY_CODE[e.code](param=e.param, retry_after_s=e.retry_after_s) from e
            raise
        return wire.result_from_bytes(operation, reply.result)

    async def close(self) -> None:
        for caller in self._callers.values():
            await caller.close()
