"""`make model` while a stack runs: price, build, first answer and flag, or nothing at all. A stack of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from deploy.local.ports import pick_port
from tests.inference.conftest import MODELS, ROOT
from tests.inference.gguf_files import write_random
from tests.inference.test_make_model import cut

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]

START_TIMEOUT_S = 900
BUILDS = ("chat-mini-q8_0", "chat-mini-q4_k_m", "embed-mini")


def command(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", *arguments),
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of a running stack with a model repository of its own; with what its dev.env says."""
    repository = tmp_path / "models"
    repository.mkdir()
    for build in BUILDS:
        shutil.copytree(MODELS / build, repository / build)
    shutil.copyfile(MODELS / "catalogue.toml", repository / "catalogue.toml")
    shutil.copyfile(ROOT / "deploy/local/prices.toml", repository / "prices.toml")
    variables = {
        **os.environ,
        "TOLLGATE_STATE": str(tmp_path / "state"),
        "TOLLGATE_PORT": str(pick_port()),
        "TOLLGATE_MODEL_REPOSITORY": str(repository),
    }
    try:
        started = command(variables, "deploy.local", "up")
        assert started.returncode == 0, started.stdout + started.stderr
        lines = (tmp_path / "state/dev.env").read_text().splitlines()
        said = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        yield {**variables, **said}
    finally:
        command(variables, "deploy.local", "down")


def test_a_running_stack_takes_a_model_in(environment: dict[str, str], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    write_random(tmp_path / "random.gguf")
    made = command(
        environment, "deploy.models", "--from", str(tmp_path / "random.gguf"), "--name", "mine", "--quant", "q4_k_m"
    )
    assert made.returncode == 0, made.stdout + made.stderr
    for line in ("relative RMSE", "the engine serves it", "mine-q4_k_m is loaded", "first answer"):
        assert line in made.stdout
    key = {"Authorization": f"Bearer {environment['TOLLGATE_API_KEY']}"}
    with httpx.Client(base_url=environment["TOLLGATE_URL"], headers=key, timeout=60) as http:
        body = {"model": "mine", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["tollgate"]["build"] == "mine-q4_k_m"
        assert float(answer.json()["tollgate"]["settled"]) > 0
        listed = {model["id"] for model in http.get("/v1/models").json()["data"]}
        assert "mine" in listed

        before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
        broken = command(environment, "deploy.models", "--from", str(cut(tmp_path / "cut.gguf")), "--name", "broken")
        assert broken.returncode == 1
        assert "truncated" in broken.stderr
        assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
        assert {model["id"] for model in http.get("/v1/models").json()["data"]} == listed
    admin = {"Authorization": environment["UNLEASH_ADMIN_TOKEN"]}
    flag = httpx.get(
        f"{environment['UNLEASH_URL'].removesuffix('/api')}/api/admin/projects/default/features/model.mine",
        headers=admin,
        timeout=60,
    )
    assert flag.status_code == 200, flag.text
