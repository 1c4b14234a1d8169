"""Which type a tensor gets in llama.cpp's named mixtures: the rules of `llama_tensor_get_type` that apply to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

QUANTIZATIONS = ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16")
# llama.cpp's LLAMA_FTYPE_MOSTLY_*: what `general.file_type` says.
FILE_TYPES = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "q8_0": 7, "f16": 1}
_BASE = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K", "q8_0": "Q8_0", "f16": "F16"}
_BLOCK = {"Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "Q8_0": 32, "Q5_0": 32, "Q5_1": 32}
# Where rows are no multiple of 256 weights.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_EXACT = re.compile(
    r"_norm\.weight$|ffn_gate_inp|position_embd|token_types|ssm_conv1d|shortconv|rope_freqs|time_mix|altup|laurel"
)
_BLOCK_NUMBER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Mixture:
    """The choice for one model. `blocks` is its number of layers."""

    quantization: str
    blocks: int
    experts: int
    is_tied: bool
    """The embedding is the output projection too."""

    def type_of(self, name: str, shape: Sequence[int]) -> str | None:
        """The type of a tensor; None: it stays as it is. `shape` begins with the row's length, as in GGUF."""
        if len(shape) < 2 or not name.endswith("weight") or _EXACT.search(name):
            return None
        return _fitting(self._wanted(name), shape[0])

    def _wanted(self, name: str) -> str:
        base = _BASE[self.quantization]
        if self.quantization not in ("q4_k_m", "q5_k_m"):
            if name == "output.weight" and self.quantization == "q6_k":
                return "Q6_K"
            return base
        if name == "output.weight" or (name == "token_embd.weight" and self.is_tied):
            return "Q6_K"
        if "attn_qkv" in name:
            return "Q5_K" if base == "Q4_K" else "Q6_K"
        if self.experts == 8:
            if "attn_v" in name or "attn_k" in name:
                return "Q8_0"
            if "attn_output" in name:
                return "Q5_K"
        if ("attn_v" in name or "ffn_down" in name) and self._matters_more(name):
            return "Q6_K"
        return base

    def _matters_more(self, name: str) -> bool:
        """The first and last eighth of the layers, and every third between."""
        found = _BLOCK_NUMBER.match(name)
        if found is None:
            return False
        block, eighth = int(found[1]), self.blocks // 8
        return block < eighth or block >= 7 * self.blocks // 8 or (block - eighth) % 3 == 2


def _fitting(kind: str, row: int) -> str:
    if row % _BLOCK.get(kind, 1):
        kind = _FALLBACK.get(kind, "F16")
    return "F16" if row % _BLOCK.get(kind, 1) else kind
