"""GGUF to quantized GGUF: `python -m deploy.models.quantization SOURCE TARGET QUANT`, in .venv-triton.

The engine's extension module exports ggml's own quantizer and its inverse. Prints one JSON line a tensor, with the
error that it cost, and a last line with all of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.models.gguf_writer import U32, GgufWriter
from deploy.models.mixture import FILE_TYPES, Mixture
from services.inference.backend.gguf import TYPES, GgufHead, TensorInfo, read_head

READABLE = ("F32", "F16", "BF16", "Q8_0")
SAMPLE_WEIGHTS = 1 << 22  # of each tensor, for its error
QUANTIZATION_VERSION = 2
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_SIZES = {name: (block, size) for name, block, size in TYPES.values()}

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class CannotQuantize(Exception):
    """One sentence that says why."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """What a tensor's new type costs: the root mean square error, by the tensor's own root mean square."""

    name: str
    kind: str
    weights: int
    relative_rmse: float


class Ggml:
    """ggml's functions out of the engine's extension module."""

    def __init__(self, threads: int) -> None:
        import xllamacpp

        extension = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
        self._library = ctypes.CDLL(str(extension))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def quantize(self, weights: FloatArray, kind: str) -> Bytes:
        """Rows of a matrix in a block type; the threads share the rows."""
        rows, length = weights.shape
        block, size = _SIZES[kind]
        target = np.empty((rows, length // block * size), np.uint8)
        step = -(-rows // self._threads)

        def part(start: int) -> None:
            source, into = weights[start : start + step], target[start : start + step]
            self._quantize(_NUMBERS[kind], source.ctypes.data, into.ctypes.data, 0, len(source), length, None)

        list(self._pool.map(part, range(0, rows, step)))
        return target

    def dequantize(self, stored: Bytes, kind: str, length: int) -> FloatArray:
        """The inverse, for rows of `length` weights."""
        name = kind.lower() if "_K" not in kind else f"{kind[0].lower()}{kind[1:]}"
        function = getattr(self._library, f"dequantize_row_{name}")
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        target = np.empty((len(stored), length), np.float32)
        function(stored.ctypes.data, target.ctypes.data, target.size)
        return target


def quantize(source: Path, target: Path, quantization: str, threads: int) -> Iterator[TensorError]:
    """Write `target` in the named mixture; yields the error of each tensor that changed its type.

    Raises CannotQuantize, GgufInvalid, OSError.
    """
    head = read_head(source)
    unreadable = sorted({t.kind for t in head.tensors} - {*READABLE, "I32"})
    if unreadable:
        raise CannotQuantize(
            f"The file is quantized already ({', '.join(unreadable)}); "
            "start from F32, F16, BF16 or Q8_0, or leave QUANT out."
        )
    mixture = mixture_of(head, quantization)
    kinds = [mixture.type_of(t.name, t.shape) or ("F32" if t.kind in ("F16", "BF16") else t.kind) for t in head.tensors]
    metadata = head.metadata | {
        "general.file_type": FILE_TYPES[quantization],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    types = head.kinds | {"general.file_type": (U32,), "general.quantization_version": (U32,)}
    ggml = Ggml(threads)
    listed = [(t.name, t.shape, kind) for t, kind in zip(head.tensors, kinds, strict=True)]
    data = np.memmap(source, np.uint8, "r")
    with GgufWriter(target, metadata, types, listed) as writer:
        for tensor, kind in zip(head.tensors, kinds, strict=True):
            stored, error = _convert(ggml, data, head, tensor, kind)
            writer.write(memoryview(stored.reshape(-1).view(np.uint8)))
            if error is not None:
                yield TensorError(tensor.name, kind, tensor.weights, error)


def mixture_of(head: GgufHead, quantization: str) -> Mixture:
    """The mixture's choice for a model."""
    names = {tensor.name for tensor in head.tensors}
    return Mixture(
        quantization=quantization,
        blocks=int(head.hyperparameter("block_count") or 0),
        experts=int(head.hyperparameter("expert_count") or 0),
        is_tied="output.weight" not in names,
    )


def _convert(ggml: Ggml, data: Bytes, head: GgufHead, tensor: TensorInfo, kind: str) -> tuple[Any, float | None]:
    start = head.data_offset + tensor.offset
    raw = data[start : start + tensor.bytes]
    if kind == tensor.kind:
        return raw, None
    length = tensor.shape[0]
    weights = _floats(ggml, raw, tensor.kind, length)
    if kind == "F32":
        return weights, None
    sample = slice(0, max(1, SAMPLE_WEIGHTS // length))
    if kind == "F16":
        half = weights.astype(np.float16)
        return half, _relative(half[sample].astype(np.float32), weights[sample])
    stored = ggml.quantize(weights, kind)
    return stored, _relative(ggml.dequantize(stored[sample], kind, length), weights[sample])


def _floats(ggml: Ggml, raw: Bytes, kind: str, length: int) -> FloatArray:
    if kind == "Q8_0":
        block, size = _SIZES[kind]
        return ggml.dequantize(np.ascontiguousarray(raw).reshape(-1, length // block * size), kind, length)
    if kind == "BF16":
        wide = raw.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(-1, length)
    return np.ascontiguousarray(raw.view(np.float16 if kind == "F16" else np.float32), np.float32).reshape(-1, length)


def _relative(stored: FloatArray, exact: FloatArray) -> float:
    scale = float(np.sqrt(np.mean(exact.astype(np.float64) ** 2)))
    return float(np.sqrt(np.mean((stored - exact).astype(np.float64) ** 2))) / scale if scale else 0.0


def main(arguments: Sequence[str]) -> int:
    source, target, quantization = Path(arguments[0]), Path(arguments[1]), arguments[2]
    total, squares = 0, 0.0
    try:
        for error in quantize(source, target, quantization, os.cpu_count() or 1):
            total += error.weights
            squares += error.weights * error.relative_rmse**2
            line = {"tensor": error.name, "type": error.kind, "weights": error.weights, "rmse": error.relative_rmse}
            print(json.dumps(line), flush=True)
    except (CannotQuantize, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps({"weights": total, "rmse": (squares / total) ** 0.5 if total else 0.0}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
