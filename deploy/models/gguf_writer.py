"""Writes a GGUF file tensor by tensor, so that a model larger than memory passes through."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from services.inference.backend.gguf import MAGIC, TYPES

VERSION = 3
ALIGNMENT = 32
STRING, ARRAY, U32 = 8, 9, 4
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}


class GgufWriter:
    """Give it the head, then every tensor's bytes in the order of the head. The file is whole once it is closed."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        kinds: Mapping[str, tuple[int, ...]],
        tensors: Sequence[tuple[str, Sequence[int], str]],
    ) -> None:
        """`tensors` are (name, shape with the row's length first, type)."""
        self._file: BinaryIO = path.open("wb")
        self._sizes = [_size(shape, kind) for _, shape, kind in tensors]
        self._next = 0
        metadata = {name: value for name, value in metadata.items() if name != "general.alignment"}
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
        for name, value in metadata.items():
            parts += [_string(name), _value(value, kinds[name])]
        offset = 0
        for (name, shape, kind), size in zip(tensors, self._sizes, strict=True):
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            parts += [_string(name), dimensions, struct.pack("<IQ", _NUMBERS[kind], offset)]
            offset += _aligned(size)
        self._file.write(b"".join(parts))
        self._pad()

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if exc is None and self._next != len(self._sizes):
            raise ValueError(f"{len(self._sizes) - self._next} tensors were not written")

    def write(self, content: bytes | memoryview) -> None:
        """The next tensor."""
        size = len(content)
        if size != self._sizes[self._next]:
            raise ValueError(f"tensor {self._next} has {size} bytes, not {self._sizes[self._next]}")
        self._next += 1
        self._file.write(content)
        self._pad()

    def _pad(self) -> None:
        place = self._file.tell()
        self._file.write(b"\0" * (_aligned(place) - place))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _size(shape: Sequence[int], kind: str) -> int:
    _, block, size = TYPES[_NUMBERS[kind]]
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any, kinds: tuple[int, ...]) -> bytes:
    kind = kinds[0]
    if kind == STRING:
        return struct.pack("<I", kind) + _string(value)
    if kind != ARRAY:
        return struct.pack(f"<I{_FORMS[kind]}", kind, value)
    of = kinds[1]
    head = struct.pack("<IIQ", ARRAY, of, len(value))
    if of == STRING:
        return head + b"".join(map(_string, value))
    return head + struct.pack(f"<{len(value)}{_FORMS[of]}", *value)
