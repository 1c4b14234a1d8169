"""The committed GGUF files, read without an engine."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from deploy.chat_mini.architecture import Architecture

MODELS = Path(__file__).resolve().parents[3] / "triton_models"
FILES = {
    "Q8_0": MODELS / "chat-mini-q8_0" / "1" / "model.gguf",
    "Q4_K_M": MODELS / "chat-mini-q4_k_m" / "1" / "model.gguf",
}
FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's llama_ftype
SIZE_LIMIT_BYTES = 12_000_000

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def read_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return file.read(read_scalar(file, "<Q")).decode()
    if kind == _ARRAY:
        element, length = read_scalar(file, "<I"), read_scalar(file, "<Q")
        return [read_value(file, element) for _ in range(length)]
    return read_scalar(file, _SCALARS[kind])


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value section of a GGUF version 3 file, and its number of tensors as `tensor_count`."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        assert read_scalar(file, "<I") == 3
        metadata: dict[str, Any] = {"tensor_count": read_scalar(file, "<Q")}
        for _ in range(read_scalar(file, "<Q")):
            name = read_value(file, _STRING)
            metadata[name] = read_value(file, read_scalar(file, "<I"))
    return metadata


def test_both_files_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in FILES.values()) <= SIZE_LIMIT_BYTES


@pytest.mark.parametrize("quantization", FILES)
def test_the_metadata_tell_the_architecture(quantization: str) -> None:
    metadata = read_metadata(FILES[quantization])
    architecture = Architecture()
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.file_type"] == FILE_TYPES[quantization]
    assert metadata["tensor_count"] == len(architecture.tensor_shapes())
    assert metadata["llama.block_count"] == architecture.block_count
    assert metadata["llama.context_length"] == architecture.context_length
    assert metadata["llama.embedding_length"] == architecture.embedding_length
    assert len(metadata["tokenizer.ggml.tokens"]) == architecture.vocabulary_size


@pytest.mark.parametrize("quantization", FILES)
def test_the_metadata_hold_tokenizer_and_chat_template(quantization: str) -> None:
    metadata = read_metadata(FILES[quantization])
    tokens = metadata["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>assistant" in metadata["tokenizer.chat_template"]


def test_both_builds_share_one_tokenizer() -> None:
    one, other = (read_metadata(path) for path in FILES.values())
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
        assert one[key] == other[key]


def test_every_row_suits_k_quants() -> None:
    matrices = [shape for shape in Architecture().tensor_shapes().values() if len(shape) == 2]
    assert all(shape[1] % 256 == 0 for shape in matrices)
