"""`make model`: from a file to a build, or to a clear error with nothing left behind."""

import json
import struct
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from deploy.models.__main__ import Place, add, parser
from deploy.models.conversion import Environment
from deploy.models.errors import ModelError
from deploy.models.mixture import Mixture
from deploy.models.source import Kind, find
from services.inference.backend.gguf import read_head
from services.inference.domain import Model, parse_catalogue
from tests.inference.client import BackendClient, chat
from tests.inference.conftest import MODELS, RunningTriton
from tests.inference.gguf_files import CHAT_MINI, write_random


@pytest.fixture
def place(tmp_path: Path) -> Place:
    repository = tmp_path / "models"
    (repository / "chat-mini-q8_0/1").mkdir(parents=True)
    (repository / "chat-mini-q8_0/1/model.py").symlink_to(MODELS / "chat-mini-q8_0/1/model.py")
    (repository / "catalogue.toml").write_text((MODELS / "catalogue.toml").read_text())
    (tmp_path / "prices.toml").write_text((MODELS.parent / "deploy/local/prices.toml").read_text())
    return Place(repository, tmp_path / "prices.toml")


def make(place: Place, source: Path | str, *arguments: str, name: str = "mine") -> str:
    return add(parser().parse_args(["--from", str(source), "--name", name, *arguments]), place, None)


def listed(place: Place) -> Model:
    models = parse_catalogue((place.repository / "catalogue.toml").read_text()).models
    (model,) = (model for model in models if model.alias == "mine")
    return model


def contents(place: Place) -> dict[str, bytes]:
    """Everything that a failed run must leave as it was."""
    files = [path for path in place.repository.rglob("*") if path.is_file()] + [place.prices]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("quantization", ["q4_k_m", "q8_0"])
def test_a_file_becomes_a_build(place: Place, tmp_path: Path, quantization: str, capsys: Any) -> None:
    write_random(tmp_path / "random.gguf")
    assert make(place, tmp_path / "random.gguf", "--quant", quantization) == f"mine-{quantization}"
    head = read_head(place.repository / f"mine-{quantization}/1/model.gguf")
    assert head.parameters == 3_672_320
    kinds = {tensor.kind for tensor in head.tensors}
    assert kinds == ({"F32", "Q4_K", "Q6_K"} if quantization == "q4_k_m" else {"F32", "Q8_0"})
    model = listed(place)
    (build,) = model.builds
    assert (build.context_tokens, build.slots, build.parameters) == (1024, 5, 3_672_320)
    prices = tomllib.loads(place.prices.read_text())["price"]
    assert [price["output"] for price in prices if price["model"] == "mine"] == ["150"]
    assert not [path.name for path in place.repository.iterdir() if path.name.startswith(".")]
    error = float(capsys.readouterr().out.split("relative RMSE ")[1].split()[0])
    assert 0 < error < (0.1 if quantization == "q4_k_m" else 0.01)


def test_the_quantizer_stores_what_llama_cpp_would(place: Place) -> None:
    """chat-mini's Q4_K_M file has the types that the mixture's rules give."""
    head = read_head(MODELS / "chat-mini-q4_k_m/1/model.gguf")
    mixture = Mixture("q4_k_m", blocks=4, experts=0, is_tied=True)
    assert {t.name: mixture.type_of(t.name, t.shape) or "F32" for t in head.tensors} == {
        t.name: t.kind for t in head.tensors
    }


def test_rows_that_no_block_fits_keep_more(place: Place) -> None:
    mixture = Mixture("q4_k_m", blocks=4, experts=0, is_tied=False)
    assert mixture.type_of("blk.1.ffn_up.weight", (96, 10)) == "Q5_0"
    assert mixture.type_of("output.weight", (96, 10)) == "Q8_0"
    assert mixture.type_of("blk.1.ffn_up.weight", (100, 10)) == "F16"
    assert mixture.type_of("blk.1.attn_norm.weight", (96,)) is None


async def test_the_build_is_served(
    place: Place, tmp_path: Path, triton: RunningTriton, repository: Path, backend: BackendClient
) -> None:
    write_random(tmp_path / "random.gguf")
    make(place, tmp_path / "random.gguf", "--quant", "q6_k", "--context-tokens", "512", "--slots", "2")
    (repository / "mine-q6_k").symlink_to(place.repository / "mine-q6_k")
    try:
        await backend.load("mine-q6_k")
        chunks = await backend.send("mine-q6_k", chat(tokens=5)).all()
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        await backend.unload("mine-q6_k")
    finally:
        (repository / "mine-q6_k").unlink()


def test_a_second_quantization_joins_the_alias(place: Place) -> None:
    make(place, CHAT_MINI)
    make(place, CHAT_MINI, "--quant", "q4_k_m")
    model = listed(place)
    assert (model.stable, [build.name for build in model.builds]) == ("mine-q8_0", ["mine-q8_0", "mine-q4_k_m"])
    with pytest.raises(ModelError, match="is there already"):
        make(place, CHAT_MINI)


def cut(path: Path) -> Path:
    path.write_bytes(CHAT_MINI.read_bytes()[:-100_000])
    return path


def unknown(path: Path) -> Path:
    path.write_bytes(CHAT_MINI.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0zebra", 1))
    return path


def without_template(path: Path) -> Path:
    path.write_bytes(CHAT_MINI.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX", 1))
    return path


def text(path: Path) -> Path:
    path.write_text("These are no weights.")
    return path


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (cut, "truncated: it has"),
        (text, "not a GGUF file"),
        (unknown, "(?s)The engine cannot serve it.*zebra"),
        (without_template, "no chat template"),
    ],
)
def test_what_cannot_be_served_leaves_nothing(place: Place, tmp_path: Path, broken: Any, message: str) -> None:
    before = contents(place)
    with pytest.raises(ModelError, match=message):
        make(place, broken(tmp_path / "broken.gguf"))
    assert contents(place) == before


def test_what_does_not_fit_leaves_nothing(place: Place) -> None:
    before = contents(place)
    with pytest.raises(ModelError, match=r"Not enough memory: .* MiB may be taken"):
        make(place, CHAT_MINI, "--context-tokens", "1000000", "--slots", "200")
    with pytest.raises(ModelError, match="a name is lower case"):
        make(place, CHAT_MINI, name="../mine")
    with pytest.raises(ModelError, match="quantized already"):
        make(place, MODELS / "chat-mini-q4_k_m/1/model.gguf", "--quant", "q8_0")
    assert contents(place) == before


def test_from_names_a_file_a_directory_or_the_hub(tmp_path: Path) -> None:
    assert find("someone/some-model").kind is Kind.HUB
    with pytest.raises(ModelError, match="no such file"):
        find("nothing.gguf")
    with pytest.raises(ModelError, match=r"no config\.json"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no architecture"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match="no weights"):
        find(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc")
    with pytest.raises(ModelError, match="no safetensors file"):
        find(str(tmp_path))
    header = json.dumps({"w": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ModelError, match="is truncated"):
        find(str(tmp_path))
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    assert find(str(tmp_path)).kind is Kind.DIRECTORY


@pytest.mark.torture
@pytest.mark.timeout(3600)
async def test_hugging_face_models_become_builds(
    place: Place, tmp_path: Path, triton: RunningTriton, repository: Path, backend: BackendClient
) -> None:
    environment = Environment(MODELS.parent)
    environment.ensure(print)
    folder = tmp_path / "hf"
    script = Path(__file__).with_name("hf_models.py")
    subprocess.run((str(environment.python), str(script), str(folder)), check=True, timeout=600)
    for name, architecture in (("llama", "llama"), ("gemma3", "gemma3"), ("qwen3", "qwen3")):
        build = make(place, folder / name, "--quant", "q4_k_m", name=name)
        assert read_head(place.repository / build / "1/model.gguf").architecture == architecture
        (repository / build).symlink_to(place.repository / build)
        try:
            await backend.load(build)
            chunks = await backend.send(build, chat(tokens=5)).all()
            assert chunks[-1]["usage"]["completion_tokens"] == 5
            await backend.unload(build)
        finally:
            (repository / build).unlink()
    config = json.loads((folder / "llama/config.json").read_text())
    (folder / "llama/config.json").write_text(json.dumps({**config, "architectures": ["ZebraForCausalLM"]}))
    before = contents(place)
    with pytest.raises(ModelError, match="does not know the architecture Zebra"):
        make(place, folder / "llama", name="zebra")
    assert contents(place) == before
