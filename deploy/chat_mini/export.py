"""Weights and vocabulary to a GGUF file, in the two quantizations that are rolled out between."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import xllamacpp

from deploy.chat_mini.architecture import Architecture
from deploy.chat_mini.tokenizer import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TEXT,
    MESSAGE_END,
    Vocabulary,
)

FloatArray = npt.NDArray[np.float32]

_FILE_TYPES: Mapping[str, Any] = {
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}


@dataclass(frozen=True)
class TensorError:
    """How far a stored tensor is from the trained one: root mean square error, absolute and by the tensor's own RMS."""

    name: str
    storage: str
    rmse: float
    relative_rmse: float


def _quantize_chunk() -> Any:
    """ggml's own quantizer, which the engine's extension module exports; the `gguf` package has no K-quants."""
    extension = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    function = ctypes.CDLL(str(extension)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return function


def quantize(weights: FloatArray, storage: Any) -> npt.NDArray[np.uint8]:
    """The rows of a matrix as ggml stores them in `storage` (a GGMLQuantizationType)."""
    source = np.ascontiguousarray(weights, np.float32)
    rows, row_length = source.shape
    block_length, block_bytes = gguf.GGML_QUANT_SIZES[storage]
    if row_length % block_length:
        raise ValueError(f"{storage.name} needs rows of a multiple of {block_length} weights, got {row_length}")
    target = np.empty((rows, row_length // block_length * block_bytes), np.uint8)
    written = _quantize_chunk()(int(storage), source.ctypes.data, target.ctypes.data, 0, rows, row_length, None)
    if written != target.nbytes:
        raise ValueError(f"{storage.name}: {written} bytes written, {target.nbytes} expected")
    return target


def _storage_of(name: str, quantization: str, block_count: int) -> Any:
    """The type of one tensor by llama.cpp's own rules for the named mixture (`llama_tensor_get_type`)."""
    types = gguf.GGMLQuantizationType
    if quantization == "Q8_0":
        return types.Q8_0
    if name == "token_embd.weight":
        return types.Q6_K  # tied: it is the output projection too
    if "attn_v" in name or "ffn_down" in name:
        block = int(name.split(".")[1])
        eighth = block_count // 8
        if block < eighth or block >= 7 * block_count // 8 or (block - eighth) % 3 == 2:
            return types.Q6_K
    return types.Q4_K


def _write_metadata(writer: Any, architecture: Architecture, vocabulary: Vocabulary, quantization: str) -> None:
    writer.add_name("chat-mini")
    writer.add_description("Tollgate's demo chat model: answers questions about Tollgate, and little else")
    writer.add_license("apache-2.0")
    writer.add_block_count(architecture.block_count)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.embedding_length)
    writer.add_feed_forward_length(architecture.feed_forward_length)
    writer.add_head_count(architecture.head_count)
    writer.add_head_count_kv(architecture.head_count_kv)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_epsilon)
    writer.add_rope_dimension_count(architecture.head_length)
    writer.add_rope_freq_base(architecture.rope_freq_base)
    writer.add_vocab_size(architecture.vocabulary_size)
    writer.add_file_type(_FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([control if token in CONTROL_TOKENS else normal for token in vocabulary.tokens])
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.tokens.index(END_OF_TEXT))
    writer.add_eos_token_id(vocabulary.tokens.index(MESSAGE_END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export_gguf(
    target: Path,
    quantization: str,
    architecture: Architecture,
    vocabulary: Vocabulary,
    weights: Mapping[str, FloatArray],
) -> list[TensorError]:
    """Write `target` at once (a temporary file beside it, then a rename) and tell what quantization cost each matrix.

    `quantization` is Q8_0 or Q4_K_M. Raises ValueError where the weights do not have the architecture's shapes.
    """
    errors: list[TensorError] = []
    temporary = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(str(temporary), "llama")
    _write_metadata(writer, architecture, vocabulary, quantization)
    for name, shape in architecture.tensor_shapes().items():
        tensor = np.ascontiguousarray(weights[name], np.float32)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tensor.shape}, not {shape}")
        if tensor.ndim == 1:  # norms stay exact, as in every llama.cpp mixture
            writer.add_tensor(name, tensor)
            continue
        storage = _storage_of(name, quantization, architecture.block_count)
        stored = quantize(tensor, storage)
        writer.add_tensor(name, stored, raw_dtype=storage)
        difference = gguf.quants.dequantize(stored, storage).reshape(shape) - tensor
        rmse = float(np.sqrt(np.mean(difference**2)))
        errors.append(TensorError(name, storage.name, rmse, rmse / float(np.sqrt(np.mean(tensor**2)))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, target)  # noqa: PTH105  # the atomic rename, named as such
    return errors
