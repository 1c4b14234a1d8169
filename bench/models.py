"""The models of bench-serving: chat-mini, and one whose engine dominates, made here with random weights.

Random weights cost what trained ones do. The big model has chat-mini's tokenizer and 143 million weights in Q4_K_M.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bench.stack import ROOT
from deploy.models.gguf_writer import GgufWriter
from services.inference.backend.gguf import read_head

CHAT_MINI = ROOT / "triton_models/chat-mini-q8_0"
BIG = "bench-big"
WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 1024, 12, 16, 4, 2816
SLOTS, CONTEXT_TOKENS = 16, 512
QUANTIZE_TIMEOUT_S = 600
EVERY_SLOT = '{ key: "tenant_slots_max" value: { string_value: "5" } },'

CATALOGUE = f"""
[models.{BIG}]
kind = "chat"
description = "Random weights"
created = 1763596800
stable = "{BIG}"
[models.{BIG}.builds.{BIG}]
engine = "llama.cpp"
quantization = "Q4_K_M"
context_tokens = {CONTEXT_TOKENS}
slots = {SLOTS}
"""
PRICE = f"""
[[price]]
model = "{BIG}"
customer_class = "default"
per_request = "0"
input = "50"
cached_input = "25"
output = "150"
"""


def repository(target: Path) -> None:
    """A model repository with chat-mini and the big model; one customer may use every slot of a build."""
    target.mkdir()
    text = (ROOT / "triton_models/catalogue.toml").read_text()
    (target / "catalogue.toml").write_text(text + CATALOGUE)
    (target / "prices.toml").write_text((ROOT / "deploy/local/prices.toml").read_text() + PRICE)
    for folder in ("chat-mini-q8_0", "chat-mini-q4_k_m", "embed-mini"):
        shutil.copytree(ROOT / "triton_models" / folder, target / folder)
    own = target / CHAT_MINI.name / "config.pbtxt"
    own.write_text(own.read_text().replace("parameters [", f"parameters [{EVERY_SLOT}", 1))
    big = target / BIG
    shutil.copytree(CHAT_MINI, big, ignore=shutil.ignore_patterns("*.gguf", "*.gpu.pbtxt"))
    configuration = (CHAT_MINI / "config.pbtxt").read_text().partition("parameters [")[0]
    parameters = {"context_tokens": CONTEXT_TOKENS, "slots": SLOTS, "tenant_slots_max": SLOTS, "threads": 1}
    lines = (f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in parameters.items())
    (big / "config.pbtxt").write_text(configuration.replace(CHAT_MINI.name, BIG) + "".join(lines))
    write_big(big / "1/model.gguf")


def write_big(target: Path) -> None:
    """Write the big model in Q4_K_M."""
    full = target.with_suffix(".f16.gguf")
    head = read_head(CHAT_MINI / "1/model.gguf")
    changes: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": WIDTH // HEADS,
    }
    listed = tensors(len(head.metadata["tokenizer.ggml.tokens"]))
    chance = np.random.default_rng(1)
    with GgufWriter(full, {**head.metadata, **changes}, head.kinds, listed) as writer:
        for _, shape, kind in listed:
            if kind == "F32":
                writer.write(np.ones(shape, np.float32).tobytes())
            else:
                weights = chance.standard_normal(shape[::-1], np.float32) * np.float32(0.02)
                writer.write(weights.astype(np.float16).tobytes())
    python = ROOT / ".venv-triton/bin/python"
    command = (str(python), "-m", "deploy.models.quantization", str(full), str(target), "q4_k_m")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=QUANTIZE_TIMEOUT_S)
    full.unlink()


def tensors(vocabulary: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of the big model's tensors."""
    kv_width = WIDTH // HEADS * KV_HEADS
    found: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", (WIDTH, vocabulary), "F16")]
    for block in range(LAYERS):
        matrices = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH, kv_width),
            "attn_v": (WIDTH, kv_width),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (WIDTH, FEED_FORWARD),
            "ffn_up": (WIDTH, FEED_FORWARD),
            "ffn_down": (FEED_FORWARD, WIDTH),
        }
        found += [(f"blk.{block}.{name}.weight", shape, "F16") for name, shape in matrices.items()]
        found += [(f"blk.{block}.{name}.weight", (WIDTH,), "F32") for name in ("attn_norm", "ffn_norm")]
    return [*found, ("output_norm.weight", (WIDTH,), "F32")]
