"""The `parameters` of config.pbtxt, checked. Every limit of the backend is one of them.

| parameter | unit, default | meaning |
|---|---|---|
| engine | llama.cpp | the adapter |
| task | chat | or embedding, rerank: what the model is for |
| pooling | model | of embeddings: model (as the weights say), mean, cls, last |
| weights | model.gguf | file beside model.py |
| context_tokens | tokens, required | prompt + completion of one request |
| slots | required | requests generated at the same time |
| threads | 0 = all cores | compute threads of the engine |
| n_gpu_layers | 0 | layers on the GPU; -1 = all |
| batch_tokens | 64 | prompt tokens computed at once: a cancel during prefill waits for one such batch (chat only) |
| queue_max, tenant_queue_max | 64, 32 | waiting requests, in all and of one tenant |
| tenant_slots_max | slots - 1 | requests of one tenant generated at once: one slot is always for somebody else |
| intake_max | 256 | requests that wait to be counted |
| request_bytes_max | 2097152 | size of a body |
| engine_silence_ms | 30000 | an engine that works on something and says nothing for so long is given up |
| chunk_interval_us | 0 | least time between the chunks of a stream, after the first; tokens in between are joined |
| completion_tokens_default | 0 = to the end of the context | when the body names no limit |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

Task = Literal["chat", "embedding", "rerank"]
Pooling = Literal["model", "mean", "cls", "last"]
TASKS: tuple[Task, ...] = get_args(Task)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
C = TypeVar("C", bound=str)


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """See the module's table."""

    build: str
    weights: Path
    engine: str
    task: Task
    pooling: Pooling
    context_tokens: int
    slots: int
    threads: int
    n_gpu_layers: int
    batch_tokens: int
    queue_max: int
    tenant_queue_max: int
    tenant_slots_max: int
    intake_max: int
    request_bytes_max: int
    engine_silence_ms: int
    chunk_interval_us: int
    completion_tokens_default: int

    @staticmethod
    def parse(build: str, folder: Path, parameters: Mapping[str, str]) -> "BackendConfig":
        """`folder` holds model.py. Raises ValueError, naming build and parameter."""

        def integer(name: str, default: int | None, least: int, most: int = 1 << 31) -> int:
            text = parameters.get(name)
            if text is None:
                if default is None:
                    raise ValueError(f"{build}: config.pbtxt lacks the parameter {name!r}")
                return default
            try:
                value = int(text)
            except ValueError:
                raise ValueError(f"{build}: parameter {name!r} is not an integer: {text!r}") from None
            if not least <= value <= most:
                raise ValueError(f"{build}: parameter {name!r} is {value}, outside {least}..{most}")
            return value

        def choice(name: str, known: tuple[C, ...]) -> C:
            value = parameters.get(name, known[0])
            for one in known:
                if one == value:
                    return one
            raise ValueError(f"{build}: parameter {name!r} is {value!r}, none of {', '.join(known)}")

        context_tokens = integer("context_tokens", None, 16)
        slots = integer("slots", None, 1, 256)
        queue_max = integer("queue_max", 64, 1, 100_000)
        config = BackendConfig(
            build=build,
            weights=folder / parameters.get("weights", "model.gguf"),
            engine=parameters.get("engine", "llama.cpp"),
            task=choice("task", TASKS),
            pooling=choice("pooling", POOLINGS),
            context_tokens=context_tokens,
            slots=slots,
            threads=integer("threads", 0, 0, 1024),
            n_gpu_layers=integer("n_gpu_layers", 0, -1, 10_000),
            batch_tokens=integer("batch_tokens", 64, 8, 65_536),
            queue_max=queue_max,
            tenant_queue_max=integer("tenant_queue_max", max(1, queue_max // 2), 1, queue_max),
            tenant_slots_max=integer("tenant_slots_max", max(1, slots - 1), 1, slots),
            intake_max=integer("intake_max", 256, 1, 100_000),
            request_bytes_max=integer("request_bytes_max", 2 << 20, 1024),
            engine_silence_ms=integer("engine_silence_ms", 30_000, 100, 3_600_000),
            chunk_interval_us=integer("chunk_interval_us", 0, 0, 1_000_000),
            completion_tokens_default=integer("completion_tokens_default", 0, 0),
        )
        if not config.weights.is_file():
            raise ValueError(f"{build}: no weights at {config.weights}")
        return config
