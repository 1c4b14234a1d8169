"""The score of the committed files, in the engine that serves them (it lives in Triton's environment)."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRITON_PYTHON = ROOT / ".venv-triton" / "bin" / "python"
DOCUMENT = ROOT / "docs" / "chat-mini.md"
DEADLINE_S = 150
REQUIRED_RIGHT = {"Q8_0": 16, "Q4_K_M": 15}


@pytest.mark.skipif(not TRITON_PYTHON.exists(), reason="needs .venv-triton, which `make test` makes")
def test_both_builds_score_what_their_documentation_says_and_stop_by_themselves() -> None:
    command = [str(TRITON_PYTHON), "-m", "deploy.chat_mini", "evaluate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    reached = {build: int(score) for build, score in re.findall(r"(Q\w+): (\d+) of 20 right", done.stdout)}
    stated = {build: int(score) for score, build in re.findall(r"\*\*(\d+) of 20 \((Q\w+)\)\*\*", DOCUMENT.read_text())}
    assert set(stated) == set(REQUIRED_RIGHT)
    for build, score in stated.items():
        assert score >= REQUIRED_RIGHT[build]
        assert reached.get(build, 0) >= score, done.stdout + done.stderr[-2000:]
