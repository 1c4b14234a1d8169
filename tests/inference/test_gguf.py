"""The head of a GGUF file, whole and broken."""

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.backend.gguf import GgufHead, GgufInvalid, read_head

WEIGHTS = Path(__file__).parents[2] / "triton_models/chat-mini-q4_k_m/1/model.gguf"


def test_the_head_tells_what_the_model_is() -> None:
    head = read_head(WEIGHTS)
    assert head.architecture == "llama"
    assert head.parameters == 3_672_320
    assert head.hyperparameter("block_count") == 4
    # 4 layers, 2 heads of 64 for keys and as many for values, 2 bytes each.
    assert head.kv_bytes_per_token() == 4 * 2 * (64 + 64) * 2
    assert {tensor.kind for tensor in head.tensors} == {"F32", "Q4_K", "Q6_K"}
    assert head.data_offset + sum(t.bytes for t in head.tensors) <= head.file_bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4 something else", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "more entries"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40), "too long"),
        (b"GGUF" + struct.pack("<IQQ", 3, 5, 5), "ends too early"),
    ],
)
def test_what_is_no_gguf_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufInvalid, match=message):
        read_head(path)


def test_a_truncated_file_is_told_from_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = WEIGHTS.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(GgufInvalid, match="truncated: it has"):
        read_head(path)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 60_000), damage=st.binary(min_size=1, max_size=8))
def test_damage_never_surprises(tmp_path_factory: pytest.TempPathFactory, place: int, damage: bytes) -> None:
    content = bytearray(WEIGHTS.read_bytes())
    content[place : place + len(damage)] = damage
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(content)
    with suppress(GgufInvalid):
        read_head(path)
    path.unlink()


@pytest.mark.parametrize(
    "figures",
    [
        {"block_count": -1, "attention.head_count": 1},
        {"block_count": 2, "attention.head_count": "two"},
        {"block_count": 2, "attention.head_count": [1, 2.5]},
        {"block_count": 2, "attention.head_count": 1, "attention.key_length": "x"},
    ],
)
def test_figures_that_no_model_has_are_refused(figures: dict[str, object]) -> None:
    with pytest.raises(GgufInvalid, match="figures"):
        head_of(figures).kv_bytes_per_token()


def test_a_file_that_claims_too_many_layers_costs_no_memory() -> None:
    head = head_of({"block_count": 2**62, "attention.head_count": 1, "attention.head_count_kv": [0, 0]})
    assert head.kv_bytes_per_token() == 0
    assert head_of({"block_count": 2**62, "attention.head_count": [0]}).kv_bytes_per_token() == 0
    assert head_of({"block_count": 2**62, "attention.head_count": 2}).kv_bytes_per_token() == 2**62 * 2 * 8 * 2


def head_of(figures: dict[str, object]) -> GgufHead:
    metadata = {"general.architecture": "a", "a.embedding_length": 8, **{f"a.{k}": v for k, v in figures.items()}}
    return GgufHead(metadata, {}, (), 0, 0)
