"""A model's place in the checkout: its folder, its entry in the catalogue, its price; all of it or nothing."""

from __future__ import annotations

import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.models.errors import ModelError
from services.inference.domain import NAME, parse_catalogue
from services.inference.errors import CatalogueInvalid

CONFIGURATION = """\
name: "{build}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [ {{ name: "REQUEST" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "RESPONSE" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters [
  {{ key: "engine" value: {{ string_value: "{engine}" }} }},
  {{ key: "context_tokens" value: {{ string_value: "{context_tokens}" }} }},
  {{ key: "slots" value: {{ string_value: "{slots}" }} }}
]
"""
MODEL = """
[models.{alias}]
kind = "{kind}"
description = "{description}"
created = {created}
stable = "{build}"
"""
BUILD = """
[models.{alias}.builds.{build}]
engine = "{engine}"
quantization = "{quantization}"
context_tokens = {context_tokens}
slots = {slots}
parameters = {parameters}
"""
PRICE = """
[[price]]
model = "{alias}"
customer_class = "default"
per_request = "0"
input = "{input}"
cached_input = "{cached}"
output = "{output}"
"""


@dataclass(frozen=True, slots=True)
class NewBuild:
    """What is to be added."""

    alias: str
    kind: str
    engine: str
    quantization: str
    context_tokens: int
    slots: int
    parameters: int
    input_price: str
    output_price: str

    @property
    def name(self) -> str:
        return f"{self.alias}-{self.quantization}"


class Registration:
    """Makes the changes one after the other and remembers how to take each back."""

    def __init__(self, repository: Path, prices: Path) -> None:
        self._repository = repository
        self._catalogue = repository / "catalogue.toml"
        self._prices = prices
        self._undo: list[Callable[[], object]] = []

    def check(self, build: NewBuild) -> None:
        """Whether there is room for the name. Raises ModelError."""
        if not NAME.fullmatch(build.alias):
            raise ModelError(f"NAME={build.alias}: a name is lower case letters, digits, dots, dashes and underscores.")
        if (self._repository / build.name).exists():
            raise ModelError(f"triton_models/{build.name} is there already; choose another NAME, or remove it.")
        self._next_catalogue(build)

    def working_folder(self, build: NewBuild) -> Path:
        """Beside the final one, hidden from Triton; gone in the end."""
        folder = self._repository / f".{build.name}.incoming"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._undo.append(lambda: shutil.rmtree(folder, ignore_errors=True))
        return folder

    def add(self, build: NewBuild, weights: Path) -> None:
        """Put the weights in place and list the build. Raises ModelError, OSError."""
        text = self._next_catalogue(build)
        folder = weights.parent / "build"
        (folder / "1").mkdir(parents=True)
        weights.rename(folder / "1" / "model.gguf")
        shutil.copyfile(self._template() / "1" / "model.py", folder / "1" / "model.py")
        values = {"build": build.name, "engine": build.engine}
        configuration = CONFIGURATION.format(**values, context_tokens=build.context_tokens, slots=build.slots)
        (folder / "config.pbtxt").write_text(configuration)
        target = self._repository / build.name
        folder.rename(target)
        self._undo.append(lambda: shutil.rmtree(target, ignore_errors=True))
        self._replace(self._catalogue, text)

    def add_price(self, build: NewBuild) -> bool:
        """List a price for the alias unless it has one; whether it had none."""
        text = self._prices.read_text()
        if any(price.get("model") == build.alias for price in tomllib.loads(text).get("price", [])):
            return False
        prices = {"input": build.input_price, "cached": build.input_price, "output": build.output_price}
        self._replace(self._prices, text.rstrip("\n") + "\n" + PRICE.format(alias=build.alias, **prices))
        return True

    def keep(self, build: NewBuild) -> None:
        """It is done: only the working folder goes."""
        shutil.rmtree(self._repository / f".{build.name}.incoming", ignore_errors=True)
        self._undo.clear()

    def take_back(self) -> None:
        """Undo everything, last first."""
        while self._undo:
            self._undo.pop()()

    def _template(self) -> Path:
        return next(path.parents[1] for path in sorted(self._repository.glob("*/1/model.py")))

    def _next_catalogue(self, build: NewBuild) -> str:
        text = self._catalogue.read_text()
        known = parse_catalogue(text)
        values = {
            "alias": build.alias,
            "kind": build.kind,
            "description": f"{build.alias}, added by `make model`.",
            "created": int(time.time()),
            "build": build.name,
            "engine": build.engine,
            "quantization": build.quantization.upper(),
            "context_tokens": build.context_tokens,
            "slots": build.slots,
            "parameters": build.parameters,
        }
        of_alias = [model for model in known.models if model.alias == build.alias]
        added = "" if of_alias else MODEL.format(**values)
        text = text.rstrip("\n") + "\n" + added + BUILD.format(**values)
        try:
            parse_catalogue(text)
        except CatalogueInvalid as error:
            raise ModelError(f"The catalogue does not take the model: {error}") from error
        return text

    def _replace(self, path: Path, text: str) -> None:
        before = path.read_text()
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        part.replace(path)
        self._undo.append(lambda: path.write_text(before))
