"""Questions that tell whether a build lives.

- A count, often: it passes through the build's process and its tokenizer, and takes no slot.
- A probe, now and then: the engine generates a token, unless it is at work anyway. An engine that hangs still counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.inference.domain import Build
from services.inference.errors import BuildDead, BuildRefused, BuildSilent, Contradiction
from services.inference.triton import TritonServer
from shared.telemetry import InferenceMetrics

QUESTION = {"messages": [{"role": "user", "content": "ping"}], "input": ["ping"]}
PROBE = {**QUESTION, "op": "probe", "max_tokens": 1}
COUNT = {**QUESTION, "op": "count"}
STATUS = {**QUESTION, "op": "status"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds."""

    canary_s: float
    first_token_s: float
    reload_quiet_s: float
    """Another replica's reload is given this long before this one reloads too."""
    probe_interval_s: float = 30.0
    """An idle engine generates a token this often."""
    probe_s: float = 15.0
    idle_s: float = 600.0
    """An on-demand build is unloaded after this long without use."""
    room_s: float = 10.0
    """Until the memory of an unloaded build is free."""


class Canary:
    """Asks builds. Every method raises TritonUnreachable, BuildSilent, BuildRefused."""

    def __init__(self, triton: TritonServer, metrics: InferenceMetrics, patience: Patience) -> None:
        self._triton = triton
        self._metrics = metrics
        self._patience = patience
        self._probed_s: dict[str, float] = {}

    async def check(self, build: Build) -> None:
        """Of a ready build."""
        if time.monotonic() - self._probed_s.get(build.name, 0.0) < self._patience.probe_interval_s:
            await self._count(build)
        else:
            await self._probe(build, self._patience.probe_s)

    async def prove(self, build: Build) -> None:
        """Before it is called ready: the configuration is the catalogue's, and a first token comes.

        Raises Contradiction too.
        """
        parameters = await self._triton.parameters(build.name)
        for name, listed in (("context_tokens", build.context_tokens), ("slots", build.slots)):
            if parameters.get(name) != str(listed):
                raise Contradiction(
                    "engine_error", f"{name} is {listed} in the catalogue and {parameters.get(name)} in config.pbtxt."
                )
        await self._count(build)
        await self._probe(build, self._patience.first_token_s)

    async def idle_s(self, build: Build) -> float | None:
        """Since the build last worked for anybody else; None when it is too busy to say."""
        status = await self._ask(build, STATUS, self._patience.canary_s)
        return status["idle_ms"] / 1000 if status is not None else None

    async def _count(self, build: Build) -> None:
        with self._metrics.canary_s.labels(build.name).time():
            answer = await self._ask(build, COUNT, self._patience.canary_s)
        if answer is not None and answer.get("context_tokens") != build.context_tokens:
            raise BuildRefused("engine_error", "Its context is not what the catalogue says.")

    async def _probe(self, build: Build, timeout_s: float) -> None:
        """Nobody answers for a process that died over it, but Triton refuses the next question to it."""
        probing = asyncio.create_task(self._ask(build, PROBE, timeout_s))
        try:
            await asyncio.wait({probing}, timeout=self._patience.canary_s)
            if not probing.done():
                await self._is_not_dead(build)
            await probing
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
        self._probed_s[build.name] = time.monotonic()

    async def _is_not_dead(self, build: Build) -> None:
        """Raises BuildDead, TritonUnreachable; a process that is slow is not."""
        try:
            await self._ask(build, COUNT, self._patience.canary_s)
        except BuildDead:
            raise
        except (BuildSilent, BuildRefused):
            return

    async def _ask(self, build: Build, question: Mapping[str, Any], timeout_s: float) -> dict[str, int] | None:
        """The answer; None when the build is alive, and busier than it should be."""
        try:
            answers = await self._triton.ask(build.name, question, timeout_s=timeout_s)
        except BuildRefused as e:
            if e.code not in ("queue_full", "deadline_exceeded"):  # these come from load by others
                raise
            return None
        return answers[0]
