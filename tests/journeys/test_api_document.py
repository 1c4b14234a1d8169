"""docs/api.md: its examples run as printed, and it knows every public address."""

import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.journeys.people import TIMEOUT_S
from tests.running_stack import RunningStack

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"
EXAMPLES_TIMEOUT_S = 120


@pytest.mark.timeout(180)
def test_every_example_runs_as_printed_in_one_shell(stack: RunningStack) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 10
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        env={
            "PATH": os.environ["PATH"],
            "TOLLGATE_URL": stack.url,
            "TOLLGATE_API_KEY": stack.api_key,
            "TOLLGATE_ADMIN_TOKEN": stack.admin_token,
        },
        capture_output=True,
        text=True,
        timeout=EXAMPLES_TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert "data: [DONE]" in result.stdout


def test_every_public_address_is_described(stack: RunningStack) -> None:
    """In full, or as `…/` and its last parts, beside one that is in full."""
    described = re.sub(r"\{\w+\}", "{}", DOCUMENT.read_text())
    paths = httpx.get(f"{stack.url}/openapi.json", timeout=TIMEOUT_S).json()["paths"]
    assert [path for path in paths if not any(form in described for form in _forms(path))] == []


def _forms(path: str) -> list[str]:
    parts = re.sub(r"\{\w+\}", "{}", path).split("/")
    return ["/".join(parts), *("/".join(["…", *parts[i:]]) for i in range(2, len(parts)))]
