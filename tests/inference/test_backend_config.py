"""config.pbtxt's parameters and the request's JSON, as the backend reads them."""

from pathlib import Path

import pytest

from services.inference.backend.config import BackendConfig
from services.inference.backend.errors import BackendError
from services.inference.backend.request import parse

LEAST = {"context_tokens": "1024", "slots": "4"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").touch()
    return tmp_path


def test_the_least_configuration_has_limits_for_everything(folder: Path) -> None:
    config = BackendConfig.parse("b", folder, LEAST)
    assert (config.context_tokens, config.slots, config.engine) == (1024, 4, "llama.cpp")
    assert (config.queue_max, config.tenant_queue_max, config.intake_max) == (64, 32, 256)
    assert config.weights == folder / "model.gguf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": "many"}, "b: parameter 'slots' is not an integer: 'many'"),
        ({"slots": "0"}, "b: parameter 'slots' is 0, outside 1..256"),
        ({"queue_max": "4", "tenant_queue_max": "5"}, "'tenant_queue_max' is 5, outside 1..4"),
        ({"weights": "missing.gguf"}, "b: no weights at"),
    ],
)
def test_a_wrong_parameter_is_named(folder: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        BackendConfig.parse("b", folder, {**LEAST, **change})
    assert message in str(caught.value)


def test_a_missing_parameter_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="lacks the parameter 'context_tokens'"):
        BackendConfig.parse("b", folder, {"slots": "1"})


def test_op_is_taken_out_of_the_body() -> None:
    parsed = parse(b'{"op":"count","messages":[{"role":"user"}]}', 100)
    assert parsed.op == "count"
    assert "op" not in parsed.body
    assert parse(b'{"messages":[{}]}', 100).op == "chat"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"messages":[{"role":"user"}],"op":"drop"}',
        b'{"op":"cancel"}',
        b'{"op":"cancel","request":7}',
        b'{"messages":"hello"}',
        b'{"messages":[]}',
        b'{"messages":["hello"]}',
        b'{"messages":[{}],"n":2}',
        b'{"messages":[{}],"max_tokens":0}',
        b'{"messages":[{}],"max_tokens":true}',
        b'{"messages":[{}],"max_completion_tokens":"9"}',
    ],
)
def test_what_no_engine_could_serve_is_an_invalid_request(raw: bytes) -> None:
    with pytest.raises(BackendError) as caught:
        parse(raw, 200_000)
    assert caught.value.code == "invalid_request"


def test_a_body_over_the_limit_is_not_even_read() -> None:
    with pytest.raises(BackendError, match="larger than 10 bytes"):
        parse(b"{" * 11, 10)
