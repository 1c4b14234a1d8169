"""GGUF files for tests and benches: random weights behind chat-mini's tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np

from deploy.models.gguf_writer import GgufWriter
from services.inference.backend.gguf import read_head

CHAT_MINI = Path(__file__).parents[2] / "triton_models/chat-mini-q8_0/1/model.gguf"


def write_random(path: Path, kind: str = "F16", **changes: Any) -> None:
    """chat-mini's architecture with random weights of type F32 or F16; `changes` replace its metadata (`_` for `.`)."""
    head = read_head(CHAT_MINI)
    metadata = {**head.metadata, "general.file_type": 1}
    for name, value in changes.items():
        key = next(key for key in metadata if key.replace(".", "_") == name)
        metadata[key] = value
    chance = np.random.default_rng(1)
    listed = [(t.name, t.shape, "F32" if len(t.shape) == 1 else kind) for t in head.tensors]
    with GgufWriter(path, metadata, head.kinds, listed) as writer:
        for _, shape, storage in listed:
            spread = 0.02 if len(shape) > 1 else 1.0
            weights = chance.normal(0, spread, shape[::-1])
            writer.write(weights.astype(np.float16 if storage == "F16" else np.float32).tobytes())
