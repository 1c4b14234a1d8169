"""GGUF files for tests and benches: random weights behind chat-mini's tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np

from deploy.models.gguf_writer import GgufWriter
from services.inference.backend.gguf import read_head

CHAT_MINI = Path(__file__).parents[2] / "triton_models/chat-mini-q8_0/1/model.gguf"


def write_reranker(path: Path) -> None:
    """chat-mini's shape as a Qwen 3 with random weights and a head that ranks."""
    head = read_head(CHAT_MINI)
    metadata = {name.replace("llama.", "qwen3."): value for name, value in head.metadata.items()}
    kinds = {name.replace("llama.", "qwen3."): kind for name, kind in head.kinds.items()}
    metadata |= {"general.architecture": "qwen3", "qwen3.attention.key_length": 64, "qwen3.pooling_type": 4}
    metadata |= {"qwen3.attention.value_length": 64, "tokenizer.ggml.seperator_token_id": 1}
    for name in ("attention.key_length", "attention.value_length", "pooling_type"):
        kinds[f"qwen3.{name}"] = (4,)
    kinds["tokenizer.ggml.seperator_token_id"] = (4,)
    listed = [(t.name, t.shape) for t in head.tensors]
    listed += [(f"blk.{n}.attn_{part}_norm.weight", (64,)) for n in range(4) for part in "qk"]
    listed.append(("cls.output.weight", (256, 1)))
    chance = np.random.default_rng(1)
    with GgufWriter(path, metadata, kinds, [(name, shape, "F32") for name, shape in listed]) as writer:
        for _, shape in listed:
            writer.write(chance.normal(0, 0.1 if len(shape) > 1 else 1.0, shape[::-1]).astype(np.float32).tobytes())


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
