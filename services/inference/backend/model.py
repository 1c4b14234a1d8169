"""What Triton calls. Every triton_models/<build>/1/model.py imports this class and nothing else."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from services.inference.backend.config import BackendConfig
from services.inference.backend.dispatcher import Dispatcher
from services.inference.backend.engine import Engine
from services.inference.backend.job import Job
from services.inference.backend.llamacpp import LlamaCpp
from services.inference.backend.llamacpp_texts import LlamaCppTexts
from services.inference.backend.scheduler import Scheduler

PRIORITY_DEFAULT = 2
TENANT_CHARACTERS_MAX = 64
MILLISECONDS = 1_000
MICROSECONDS = 1_000_000


def _llama_cpp(config: BackendConfig) -> Engine:
    return LlamaCpp(config) if config.task == "chat" else LlamaCppTexts(config)


ENGINES: dict[str, Callable[[BackendConfig], Engine]] = {"llama.cpp": _llama_cpp}


class TritonPythonModel:
    """One instance a process: decoupled, unbatched, KIND_CPU or KIND_GPU with count 1."""

    def initialize(self, args: dict[str, str]) -> None:
        build = args["model_name"]
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"]).get("parameters", {}).items()
        }
        folder = Path(args["model_repository"]) / args["model_version"]
        config = BackendConfig.parse(build, folder, parameters)
        if config.engine not in ENGINES:
            raise ValueError(f"{build}: unknown engine {config.engine!r}; known: {', '.join(ENGINES)}")
        self._engine: Engine = ENGINES[config.engine](config)
        self._dispatcher = Dispatcher(
            build,
            kv_tokens_max=self._engine.slots * self._engine.context_tokens,
            chunk_interval_s=config.chunk_interval_us / MICROSECONDS,
            engine_silence_s=config.engine_silence_ms / MILLISECONDS,
        )
        self._scheduler = Scheduler(self._engine, config, self._dispatcher.post, time.monotonic)
        self._dispatcher.start(self._scheduler)
        self._scheduler.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            job = _job(request)
            self._dispatcher.accept(job)
            self._scheduler.submit(job)

    def finalize(self) -> None:
        self._scheduler.close()
        self._dispatcher.close()
        self._engine.close()


def _job(request: Any) -> Job:
    now = time.monotonic()
    parameters = json.loads(request.parameters() or "{}")
    priority = parameters.get("tg_priority", PRIORITY_DEFAULT)
    timeout_us = request.timeout()
    content = pb_utils.get_input_tensor_by_name(request, "REQUEST").as_numpy().reshape(-1)[0]
    return Job(
        sender=request.get_response_sender(),
        body=bytes(content),
        priority=priority if isinstance(priority, int) else PRIORITY_DEFAULT,
        tenant=str(parameters.get("tg_tenant", ""))[:TENANT_CHARACTERS_MAX],
        received_at=now,
        deadline=now + timeout_us / MICROSECONDS if timeout_us else None,
        one_by_one=parameters.get("tg_one_by_one") == 1,
        id=request.request_id(),
    )
