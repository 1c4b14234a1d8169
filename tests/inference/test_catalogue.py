"""catalogue.toml: what is accepted, and what a mistake is told."""

from pathlib import Path

import pytest

from services.inference.domain import Build, parse_catalogue
from services.inference.errors import CatalogueInvalid

ROOT = Path(__file__).parents[2]

GOOD = """
[models.small]
kind = "chat"
description = "Small"
created = 1763596800
stable = "small-q8"
[models.small.builds.small-q8]
engine = "llama.cpp"
quantization = "Q8_0"
context_tokens = 1024
slots = 4
parameters = 5_000_000
[models.small.builds.small-q4]
engine = "llama.cpp"
quantization = "Q4_K_M"
context_tokens = 2048
slots = 2
"""


def test_a_catalogue_is_read_whole() -> None:
    catalogue = parse_catalogue(GOOD)
    (model,) = catalogue.models
    assert (model.alias, model.kind, model.stable, model.created) == ("small", "chat", "small-q8", 1763596800)
    assert model.builds == (
        Build("small-q8", "llama.cpp", "Q8_0", 1024, 4, 5_000_000),
        Build("small-q4", "llama.cpp", "Q4_K_M", 2048, 2, 0),
    )
    assert catalogue.alias_of("small-q4") == "small"
    assert list(catalogue.builds) == ["small-q8", "small-q4"]


def test_the_repository_s_own_catalogue_agrees_with_its_configurations() -> None:
    catalogue = parse_catalogue((ROOT / "triton_models" / "catalogue.toml").read_text())
    for build in catalogue.builds.values():
        for file in (ROOT / "triton_models" / build.name).glob("config*.pbtxt"):
            config = file.read_text()
            assert f'name: "{build.name}"' in config
            assert f'key: "context_tokens" value: {{ string_value: "{build.context_tokens}" }}' in config
        config = (ROOT / "triton_models" / build.name / "config.pbtxt").read_text()
        assert f'key: "slots" value: {{ string_value: "{build.slots}" }}' in config


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[models.small]", "[models.small", "not valid TOML"),
        ('stable = "small-q8"', 'stable = "small-q5"', "models.small.stable names 'small-q5'"),
        ('kind = "chat"', 'kind = "poem"', "models.small.kind is 'poem'; known: chat, embedding, rerank"),
        ('kind = "chat"\n', "", "models.small.kind must be a string"),
        ("slots = 4", "slots = 0", "small-q8.slots is 0; at least 1"),
        ("slots = 4", "slots = true", "small-q8.slots must be an integer"),
        ("slots = 4", 'slots = "4"', "small-q8.slots must be an integer"),
        ("context_tokens = 1024", "context_tokens = 2", "small-q8.context_tokens is 2; at least 16"),
        ("context_tokens = 1024", "context = 1024", "unknown key 'context'"),
        ('description = "Small"', 'description = ""', "models.small.description must have 1 to 500 characters"),
        ("[models.small.builds.small-q4]", '[models.small.builds."../up"]', "a name is lower case letters"),
        ("[models.small]", "[other.small]", "unknown key 'other'"),
    ],
)
def test_a_mistake_is_named_with_its_place(before: str, after: str, message: str) -> None:
    assert before in GOOD
    with pytest.raises(CatalogueInvalid) as caught:
        parse_catalogue(GOOD.replace(before, after, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "models = 3", "[models]", GOOD.partition("[models.small.builds")[0]])
def test_an_empty_catalogue_says_what_it_needs(text: str) -> None:
    with pytest.raises(CatalogueInvalid, match="needs at least one entry"):
        parse_catalogue(text)


def test_a_build_belongs_to_one_model() -> None:
    with pytest.raises(CatalogueInvalid, match="'small-q8' is listed by 'small' and 'twin'"):
        parse_catalogue(GOOD + GOOD.replace("models.small", "models.twin"))
