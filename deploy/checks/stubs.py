"""The committed gRPC stubs are what the .proto files give: `python -m deploy.checks.stubs [--write]`."""

import filecmp
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc_tools  # type: ignore[import-untyped]
from grpc_tools import protoc

RPC = Path("shared/rpc")
# google/protobuf/*.proto
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(target: Path) -> list[Path]:
    """Generate the stubs of every .proto below `target`, which mirrors the repository; their relative paths."""
    sources = [str(path) for path in sorted(RPC.glob("*.proto"))]
    outputs = (f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}")
    if protoc.main(["protoc", "-I.", f"-I{WELL_KNOWN}", *outputs, *sources]) != 0:
        raise SystemExit("protoc failed; its own words are above.")
    return sorted(path.relative_to(target) for path in (target / RPC).iterdir())


def main(arguments: Sequence[str]) -> int:
    """Compare, or with --write replace; 1 when a committed stub differs, is missing or has no source."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory)
        generated = generate(target)
        if "--write" in arguments:
            for path in generated:
                shutil.copyfile(target / path, path)
            return 0
        stale = [path for path in generated if not path.exists() or not filecmp.cmp(target / path, path, shallow=False)]
    orphans = set(RPC.glob("*_pb2*.py*")) - set(generated)
    for path in [*stale, *sorted(orphans)]:
        print(f"{path} is not what the .proto files give: `make stubs`, or remove it")
    if not stale and not orphans:
        print(f"stubs: {len(generated)} are fresh")
    return 1 if stale or orphans else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
