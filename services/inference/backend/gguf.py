"""The head of a GGUF file: metadata and the table of tensors, without the weights. Standard library only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_DEFAULT = 32
ENTRIES_MAX = 1 << 16
ARRAY_MAX = 1 << 22
STRING_BYTES_MAX = 1 << 24
DIMENSIONS_MAX = 4

# ggml's types: number → (name, weights in a block, bytes of a block).
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip

_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


class GgufInvalid(Exception):
    """The file is not a whole GGUF file; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`kind` is the name of ggml's type. `weights` is their number, `bytes` their size in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def weights(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        block, size = _BLOCKS[self.kind]
        return self.weights // block * size


_BLOCKS = {name: (block, size) for name, block, size in TYPES.values()}


@dataclass(frozen=True, slots=True)
class GgufHead:
    """`metadata` by GGUF's own keys; `kinds` are its values' types, for a list that of its elements too."""

    metadata: dict[str, Any]
    kinds: dict[str, tuple[int, ...]]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(tensor.weights for tensor in self.tensors)

    def hyperparameter(self, name: str) -> Any:
        """`<architecture>.<name>`, None when it is not there."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def kv_bytes_per_token(self) -> int:
        """Of an F16 cache, for one token: an upper bound where layers share or limit theirs; 0 if unknown.

        Raises GgufInvalid for figures that are none.
        """
        layers, heads = self.hyperparameter("block_count"), self.hyperparameter("attention.head_count")
        width = self.hyperparameter("embedding_length")
        if not isinstance(layers, int) or not isinstance(width, int) or not heads:
            return 0
        head_width = width // max(1, *_figures(heads))
        kv_heads = self.hyperparameter("attention.head_count_kv") or heads
        of_layers = sum(_figures(kv_heads)) * (1 if isinstance(kv_heads, list) else _figures(layers)[0])
        key, value = (
            _figures(self.hyperparameter(f"attention.{name}_length") or head_width)[0] for name in ("key", "value")
        )
        return of_layers * (key + value) * 2


def _figures(value: object) -> list[int]:
    """A whole number, or a list of them. Raises GgufInvalid for anything else."""
    found: list[Any] = value if isinstance(value, list) else [value]
    figures = [figure for figure in found if isinstance(figure, int) and figure >= 0]
    if not found or len(figures) < len(found):
        raise GgufInvalid("The file's head holds figures that no model has.")
    return figures


def read_head(path: Path) -> GgufHead:
    """Read and check the head, and that the file is as long as its tensors need. Raises GgufInvalid, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _Reader(file, size).head()
        except (struct.error, UnicodeDecodeError, MemoryError) as error:
            raise GgufInvalid(f"{path.name} ends too early or is damaged in its head.") from error


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def head(self) -> GgufHead:
        if self._file.read(4) != MAGIC:
            raise GgufInvalid("This is not a GGUF file.")
        version = self._number(_U32)
        if version not in VERSIONS:
            raise GgufInvalid(f"GGUF version {version} is not known here.")
        tensors, entries = self._count(), self._count()
        metadata: dict[str, Any] = {}
        kinds: dict[str, tuple[int, ...]] = {}
        for _ in range(entries):
            key = self._string()
            metadata[key], kinds[key] = self._value(self._number(_U32))
        infos = tuple(self._tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise GgufInvalid("The alignment in the file is wrong.")
        data_offset = -(-self._file.tell() // alignment) * alignment
        needed = max((data_offset + info.offset + info.bytes for info in infos), default=data_offset)
        if needed > self._size:
            raise GgufInvalid(f"The file is truncated: it has {self._size:,} bytes and its tensors need {needed:,}.")
        return GgufHead(metadata, kinds, infos, data_offset, self._size)

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._file.read(form.size))[0]

    def _count(self) -> int:
        count = int(self._number(_U64))
        if count > ENTRIES_MAX:
            raise GgufInvalid("The file's head claims more entries than any model has.")
        return count

    def _string(self) -> str:
        length = int(self._number(_U64))
        if length > STRING_BYTES_MAX:
            raise GgufInvalid("The file's head holds a text that is too long.")
        content = self._file.read(length)
        if len(content) < length:
            raise struct.error
        return content.decode("utf-8", "replace")

    def _value(self, kind: int) -> tuple[Any, tuple[int, ...]]:
        if kind == _STRING:
            return self._string(), (kind,)
        if kind != _ARRAY:
            return self._number(self._scalar(kind)), (kind,)
        of = self._number(_U32)
        length = int(self._number(_U64))
        if length > ARRAY_MAX or of == _ARRAY:
            raise GgufInvalid("The file's head holds a list that is too long or nested.")
        if of == _STRING:
            return [self._string() for _ in range(length)], (kind, of)
        form = self._scalar(of)
        return list(struct.unpack(f"<{length}{form.format[1:]}", self._file.read(length * form.size))), (kind, of)

    def _scalar(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise GgufInvalid(f"The file's head holds a value of the unknown type {kind}.")
        return _SCALARS[kind]

    def _tensor(self) -> TensorInfo:
        name = self._string()
        dimensions = self._number(_U32)
        if dimensions > DIMENSIONS_MAX:
            raise GgufInvalid(f"The tensor {name!r} has {dimensions} dimensions.")
        shape = tuple(self._number(_U64) for _ in range(dimensions))
        kind = self._number(_U32)
        if kind not in TYPES:
            raise GgufInvalid(f"The tensor {name!r} is of the unknown type {kind}.")
        return TensorInfo(name, shape, TYPES[kind][0], int(self._number(_U64)))
