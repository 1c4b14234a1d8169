"""The commands that README.md prints are run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running_stack import RunningStack

README = Path(__file__).resolve().parents[2] / "README.md"
TIMEOUT_S = 60


def example(name: str) -> str:
    """The code block that follows `<!-- example: name -->`."""
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"README.md has no example {name}"
    return found[1]


def run(command: list[str], stack: RunningStack) -> str:
    environment = {"PATH": os.environ["PATH"], "TOLLGATE_URL": stack.url, "TOLLGATE_API_KEY": stack.api_key}
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_first_request_with_curl_streams_to_its_end(stack: RunningStack) -> None:
    output = run(["bash", "-euc", example("curl")], stack)
    assert output.count("data: {") > 3
    assert output.rstrip().endswith("data: [DONE]")


def test_the_first_request_with_the_openai_sdk_prints_an_answer(stack: RunningStack) -> None:
    assert len(run([sys.executable, "-c", example("python")], stack).split()) > 3


def test_the_wallet_is_shown(stack: RunningStack) -> None:
    assert '"available"' in run(["bash", "-euc", example("wallet")], stack)


@pytest.mark.parametrize("target", ["up", "down", "status", "logs", "reset", "test", "help"])
def test_every_make_target_that_it_names_exists(target: str) -> None:
    makefile = (README.parent / "Makefile").read_text()
    assert f"make {target}" in README.read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_link_leads_to_something() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README.read_text())
    assert [link for link in links if not (README.parent / link).exists()] == []
