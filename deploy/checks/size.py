"""No file is longer than 400 lines and no function longer than 70: `python -m deploy.checks.size [DIRECTORY…]`.

Lines, not statements: what does not fit on a screen is not read as a whole. Generated stubs do not count, nor does the
docstring of a function.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def problems(path: Path) -> Iterator[str]:
    """What is too long in one file."""
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"{path}: {lines} lines (at most {FILE_LINES_MAX})"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _length(node)
            if length > FUNCTION_LINES_MAX:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines (at most {FUNCTION_LINES_MAX})"


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    end = node.end_lineno or node.lineno
    documented = ast.get_docstring(node) is not None
    docstring = node.body[0] if documented else None
    docstring_lines = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
    return end - node.lineno + 1 - docstring_lines


def main(directories: Sequence[str]) -> int:
    """Print what is too long; 1 when anything is."""
    files = sorted(path for directory in directories for path in Path(directory).rglob("*.py"))
    found = [
        problem
        for path in files
        if not path.name.endswith(GENERATED) and "node_modules" not in path.parts
        for problem in problems(path)
    ]
    print("\n".join(found) or f"sizes: {len(files)} files are short enough")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["services", "shared", "deploy", "tests", "bench"]))
