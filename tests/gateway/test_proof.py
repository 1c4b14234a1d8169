"""docs/operations names tests as proof: there are such tests."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
DOCUMENTS = sorted((ROOT / "docs/operations").glob("*.md"))


def names_in(module: Path) -> set[str]:
    return {n.name for n in ast.parse(module.read_text()).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = NAMED.findall(document.read_text())
    assert [f"{path}::{name}" for path, name in named if name not in names_in(ROOT / path)] == []


def test_the_proof_names_many() -> None:
    assert len(NAMED.findall((ROOT / "docs/operations/edge-proof.md").read_text())) > 50
