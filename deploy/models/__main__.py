"""The command behind `make model`: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local.state import layout_from
from deploy.models.activation import RunningStack
from deploy.models.conversion import Environment, to_gguf
from deploy.models.errors import ModelError
from deploy.models.mixture import QUANTIZATIONS
from deploy.models.registration import NewBuild, Registration
from deploy.models.source import Kind, Source, check_gguf, find
from services.inference.backend.gguf import GgufHead
from services.inference.domain import KINDS, Build
from services.inference.memory import machine_memory, mib, needed_bytes

ROOT = Path(__file__).resolve().parents[2]
ENGINE = "llama.cpp"
CONTEXT_TOKENS_MAX = 4096
SLOTS = 5
TRIAL_TIMEOUT_S = 1800
MEMORY_SHARE_MAX = 0.85
DISK_SHARE = 1.1
REPORT_INTERVAL_S = 2.0
_ENGINE_ERROR = re.compile(r"^\S+ E (.*)$", re.MULTILINE)


def report(line: str) -> None:
    """Progress, for a person."""
    print(f"  {line}", flush=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the model goes: a model repository and a price list."""

    repository: Path
    prices: Path


def add(options: argparse.Namespace, place: Place, stack: RunningStack | None) -> str:
    """From the source to a build in the catalogue, and into the stack when one runs; the build's name.

    Raises ModelError, and has left nothing then.
    """
    source = find(options.source)
    registration = Registration(place.repository, place.prices)
    quantization = options.quant or _quantization_of(source)
    build = _new_build(options, quantization, context_tokens=options.context_tokens or 16, parameters=0)
    registration.check(build)
    try:
        folder = registration.working_folder(build)
        weights = _weights(source, folder, options.quant)
        head = check_gguf(weights)
        _check_template(head, options.kind)
        context_tokens = options.context_tokens or _context_tokens(head)
        build = _new_build(options, quantization, context_tokens=context_tokens, parameters=head.parameters)
        _check_memory(weights, build)
        _try(weights, build)
        registration.add(build, weights)
        registration.add_price(build)
        if stack is None:
            report("no stack runs: the next `make up` loads it")
        else:
            _activate(build, stack)
    except BaseException as error:
        registration.take_back()
        if isinstance(error, OSError):
            raise ModelError(f"{error.strerror or error}: {error.filename or ''}") from error
        raise
    registration.keep(build)
    return build.name


def _new_build(options: argparse.Namespace, quantization: str, *, context_tokens: int, parameters: int) -> NewBuild:
    return NewBuild(
        alias=options.name,
        kind=options.kind,
        engine=ENGINE,
        quantization=quantization,
        context_tokens=context_tokens,
        slots=options.slots,
        parameters=parameters,
        input_price=options.input_price,
        output_price=options.output_price,
    )


def _quantization_of(source: Source) -> str:
    """Without QUANT a GGUF file is taken as it is, and anything else becomes Q4_K_M."""
    if source.kind is not Kind.GGUF:
        return "q4_k_m"
    kinds = [tensor.kind for tensor in check_gguf(source.path).tensors if len(tensor.shape) > 1]
    return max(set(kinds), key=kinds.count).lower() if kinds else "f32"


def _weights(source: Source, folder: Path, quantization: str | None) -> Path:
    """The file to serve, in the working folder. Raises ModelError."""
    target = folder / "model.gguf"
    if source.kind is Kind.GGUF:
        _check_disk(folder, source.path.stat().st_size)
        if quantization is None:
            shutil.copyfile(source.path, target)
            return target
        original = source.path
    else:
        original = folder / "converted.gguf"
        to_gguf(source, original, Environment(ROOT), report)
        if quantization == "f16":
            return original.rename(target)
    _quantize(original, target, quantization or "q4_k_m")
    if source.kind is not Kind.GGUF:
        original.unlink()
    return target


def _quantize(source: Path, target: Path, quantization: str) -> None:
    """Show progress and the error that it costs. Raises ModelError."""
    total = check_gguf(source).parameters
    command = (str(_triton_python()), "-m", "deploy.models.quantization", str(source), str(target), quantization)
    done, shown_s, last = 0, 0.0, {"error": "the quantizer ended without a word"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            done += last.get("weights", 0) if "tensor" in last else 0
            if "tensor" in last and time.monotonic() - shown_s > REPORT_INTERVAL_S:
                shown_s = time.monotonic()
                report(f"quantizing {done / total:4.0%}  {last['tensor']} as {last['type']}, RMSE {last['rmse']:.4f}")
    if process.returncode != 0 or "error" in last:
        raise ModelError(f"Quantizing failed: {last.get('error', 'the quantizer crashed')}")
    size = target.stat().st_size
    report(f"quantized to {mib(size)}; relative RMSE {last['rmse']:.4f} over {last['weights']:,} weights")


def _try(weights: Path, build: NewBuild) -> None:
    """Load it once, apart from everything else. Raises ModelError."""
    command = (str(_triton_python()), "-m", "deploy.models.trial", str(weights), build.kind)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=TRIAL_TIMEOUT_S, check=False
        )
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise ModelError(f"The engine did not answer within {TRIAL_TIMEOUT_S} s.") from None
    except (ValueError, IndexError):
        result = {"error": "its process crashed"}
    if "error" in result:
        reasons = [found[1] for found in _ENGINE_ERROR.finditer(done.stderr)]
        raise ModelError(f"The engine cannot serve it: {result['error']}" + "".join(f"\n    {r}" for r in reasons[:3]))
    report(f"the engine serves it: {result['tokens']} tokens")


def _activate(build: NewBuild, stack: RunningStack) -> None:
    stack.publish_price()
    stack.load(build)
    report(f"{build.name} is loaded")
    report(f"first answer: {stack.smoke(build)!r}")
    stack.make_flags()


def _check_template(head: GgufHead, kind: str) -> None:
    if kind == "chat" and not head.metadata.get("tokenizer.chat_template"):
        raise ModelError("The model has no chat template, so it cannot chat; take its instruction-tuned version.")


def _context_tokens(head: GgufHead) -> int:
    trained = head.hyperparameter("context_length")
    return min(trained if isinstance(trained, int) and trained >= 16 else CONTEXT_TOKENS_MAX, CONTEXT_TOKENS_MAX)


def _check_memory(weights: Path, build: NewBuild) -> None:
    entry = Build(build.name, ENGINE, build.quantization, build.context_tokens, build.slots, build.parameters)
    needed, room = needed_bytes(weights, entry), machine_memory().room(MEMORY_SHARE_MAX)
    if needed > room:
        raise ModelError(
            f"Not enough memory: weights and the cache of {build.slots} requests of {build.context_tokens} tokens need "
            f"{mib(needed)}, and {mib(max(0, room))} may be taken. Try a smaller QUANT, CONTEXT or SLOTS."
        )


def _check_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size * DISK_SHARE:
        raise ModelError(f"Not enough space on the disk: {mib(size)} are needed, {mib(free)} are free.")


def _triton_python() -> Path:
    python = ROOT / ".venv-triton" / "bin" / "python"
    if not python.exists():
        raise ModelError("The engine's environment has not been made yet: `make environments` does.")
    return python


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="make model", description="Serve a model of your own.")
    arguments.add_argument("--from", dest="source", required=True, help="GGUF file, Hugging Face directory, or hub id")
    arguments.add_argument("--name", required=True, help="the alias that customers use")
    arguments.add_argument("--quant", choices=QUANTIZATIONS, help="without: a GGUF as it is, anything else q4_k_m")
    arguments.add_argument("--kind", choices=KINDS, default="chat")
    arguments.add_argument("--context-tokens", type=int, help="of one request; default the model's own, at most 4096")
    arguments.add_argument("--slots", type=int, default=SLOTS, help="requests at once")
    arguments.add_argument("--input-price", default="50", help="credits for a million prompt tokens")
    arguments.add_argument("--output-price", default="150", help="credits for a million generated tokens")
    return arguments


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        layout = layout_from(ROOT, os.environ)
        name = add(options, Place(layout.models, layout.prices), RunningStack.find(ROOT, os.environ))
    except ModelError as error:
        print(f"\n{error}\nNothing was changed.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was changed.", file=sys.stderr)
        return 130
    print(f"\n{options.name} is there: build {name}, listed in triton_models/catalogue.toml.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
