"""The network as a pure function of its weights, which carry their GGUF names from the first step to the file."""

from collections.abc import Mapping
from typing import Any

import torch  # type: ignore[import-not-found]  # an extra, not in the services' environment
import torch.nn.functional as functional  # type: ignore[import-not-found]

from deploy.chat_mini.architecture import Architecture

Weights = Mapping[str, Any]
"""Tensor by GGUF name."""


def initial_weights(architecture: Architecture, seed: int) -> dict[str, Any]:
    """Normal weights of standard deviation 0.02, residual outputs scaled down by depth as in GPT-2, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = {}
    for name, shape in architecture.tensor_shapes().items():
        if len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            deviation = 0.02
            if "attn_output" in name or "ffn_down" in name:
                deviation /= (2 * architecture.block_count) ** 0.5
            tensor = torch.randn(shape, generator=generator) * deviation
        weights[name] = torch.nn.Parameter(tensor)
    return weights


def rotary_table(architecture: Architecture, length: int) -> tuple[Any, Any]:
    """Cosines and sines by position and pair, for `rotate`."""
    half = architecture.head_length // 2
    rates = architecture.rope_freq_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates[None, :]
    return torch.cos(angles), torch.sin(angles)


def rotate(heads: Any, rotary: tuple[Any, Any]) -> Any:
    """Rotary position embedding over neighbouring pairs, the layout of llama.cpp's `llama` architecture."""
    cosines, sines = rotary
    even, odd = heads[..., 0::2].float(), heads[..., 1::2].float()
    turned = torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), dim=-1)
    return turned.flatten(-2).to(heads.dtype)


def hidden_states(weights: Weights, architecture: Architecture, tokens: Any, rotary: tuple[Any, Any]) -> Any:
    """The last hidden state of each position of `tokens` (rows, length), normalised, ready for the output matrix."""
    rows, length = tokens.shape
    width, epsilon = architecture.embedding_length, architecture.rms_norm_epsilon
    repeats = architecture.head_count // architecture.head_count_kv

    def split(flat: Any, heads: int) -> Any:
        return flat.view(rows, length, heads, architecture.head_length).transpose(1, 2)

    state = functional.embedding(tokens, weights["token_embd.weight"])
    for block in range(architecture.block_count):
        prefix = f"blk.{block}."
        normed = functional.rms_norm(state, (width,), weights[prefix + "attn_norm.weight"], epsilon)
        query = split(functional.linear(normed, weights[prefix + "attn_q.weight"]), architecture.head_count)
        key = split(functional.linear(normed, weights[prefix + "attn_k.weight"]), architecture.head_count_kv)
        value = split(functional.linear(normed, weights[prefix + "attn_v.weight"]), architecture.head_count_kv)
        attended = functional.scaled_dot_product_attention(
            rotate(query, rotary),
            rotate(key, rotary).repeat_interleave(repeats, dim=1),
            value.repeat_interleave(repeats, dim=1),
            is_causal=True,
        )
        joined = attended.transpose(1, 2).reshape(rows, length, width)
        state = state + functional.linear(joined, weights[prefix + "attn_output.weight"])
        normed = functional.rms_norm(state, (width,), weights[prefix + "ffn_norm.weight"], epsilon)
        gate = functional.silu(functional.linear(normed, weights[prefix + "ffn_gate.weight"]))
        inner = gate * functional.linear(normed, weights[prefix + "ffn_up.weight"])
        state = state + functional.linear(inner, weights[prefix + "ffn_down.weight"])
    return functional.rms_norm(state, (width,), weights["output_norm.weight"], epsilon)
