"""JSON schemas of clients: what an answer must satisfy, and the part of it that an engine's grammar may see.

A schema is hostile input twice. Here it is checked by a validator with linear-time patterns and no way to fetch a
reference. The engine turns schemas into grammars, whose size and recursion its users must bound: so it gets a reduced
form, made only of what is known to be safe there. What the reduction drops, the validator still demands of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema_rs
import orjson

from services.chat.errors import invalid_schema

SCHEMA_BYTES_MAX = 32 * 1024
NODES_MAX = 1_000
DEPTH_MAX = 32
REPETITIONS_MAX = 1_000  # the engine refuses grammars with more
PATTERN_CHARS_MAX = 128
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

_SIMPLE_PATTERN = re.compile(r"\^[^(){}|]*\$")  # without groups and counts a pattern cannot grow as a grammar
_REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")
_BOUNDS = ("minItems", "maxItems", "minLength", "maxLength")
_VERBATIM = ("type", "enum", "const", "required")


class Constraint:
    """What a JSON document must satisfy."""

    __slots__ = ("_validator", "for_engine", "schema")

    def __init__(self, schema: Mapping[str, Any], param: str) -> None:
        """Raises InvalidRequest that names `param` for a schema that is none, too large, or refers to elsewhere."""
        self.schema = schema
        try:
            if len(orjson.dumps(schema)) > SCHEMA_BYTES_MAX:
                raise invalid_schema(param, f"It has more than {SCHEMA_BYTES_MAX} bytes.")
            self._validator = jsonschema_rs.Draft202012Validator(
                dict(schema), pattern_options=jsonschema_rs.RegexOptions(), retriever=_nowhere
            )
        except (ValueError, TypeError):  # orjson's name for too deep, and for numbers beyond 64 bits, is TypeError
            raise invalid_schema(param, "It is not a JSON schema of draft 2020-12 that stands by itself.") from None
        self.for_engine: Mapping[str, Any] = _Reduction(schema, param).root

    def is_met_by(self, text: str) -> bool:
        """Whether a text is one JSON document, and as it must be."""
        try:
            value = orjson.loads(text)
        except ValueError:
            return False
        return bool(self._validator.is_valid(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constraint) and other.schema == self.schema

    def __hash__(self) -> int:
        return hash(orjson.dumps(self.schema, option=orjson.OPT_SORT_KEYS))


def _nowhere(uri: str) -> Any:
    raise ValueError("references lead nowhere but into the schema itself")


class _Reduction:
    """The engine's form of a schema: `root`."""

    def __init__(self, schema: Mapping[str, Any], param: str) -> None:
        self._param = param
        self._nodes = 0
        self._schema = schema
        self.root: dict[str, Any] = self._reduce(schema, 0)
        for place in ("$defs", "definitions"):
            if isinstance(definitions := schema.get(place), dict):
                self.root[place] = {name: self._reduce(d, 1) for name, d in definitions.items()}
        self._refuse_endless()

    def _reduce(self, node: Any, depth: int) -> dict[str, Any]:
        self._nodes += 1
        if self._nodes > NODES_MAX or depth > DEPTH_MAX:
            raise invalid_schema(self._param, f"It has more than {NODES_MAX} parts, or is deeper than {DEPTH_MAX}.")
        if not isinstance(node, dict):
            return {}
        if "$ref" in node:
            reference = node["$ref"]
            known = isinstance(reference, str) and _REFERENCE.fullmatch(reference)
            return {"$ref": reference} if known else {}
        if isinstance(joined := node.get("allOf"), list) and len(joined) == 1:
            return self._reduce(joined[0], depth + 1)
        reduced = {key: node[key] for key in _VERBATIM if key in node}
        reduced |= {key: node[key] for key in _BOUNDS if self._is_small(node.get(key))}
        if _is_simple(node.get("pattern")):
            reduced["pattern"] = node["pattern"]
        reduced |= self._children(node, depth)
        return reduced

    def _children(self, node: dict[str, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in ("anyOf", "oneOf"):
            if isinstance(several := node.get(key), list):
                found["anyOf"] = [self._reduce(one, depth + 1) for one in several]
        if isinstance(properties := node.get("properties"), dict):
            found["properties"] = {name: self._reduce(p, depth + 1) for name, p in properties.items()}
        if isinstance(items := node.get("items"), dict):
            found["items"] = self._reduce(items, depth + 1)
        if isinstance(others := node.get("additionalProperties"), bool | dict):
            found["additionalProperties"] = others if isinstance(others, bool) else self._reduce(others, depth + 1)
        return found

    @staticmethod
    def _is_small(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= REPETITIONS_MAX

    def _refuse_endless(self) -> None:
        """A reference that leads back to itself with nothing in between is a grammar without an end."""
        done: set[str] = set()

        def visit(node: Any, path: tuple[str, ...]) -> None:
            for reference in _direct_references(node):
                if reference in path:
                    raise invalid_schema(self._param, "A reference in it leads back to itself.")
                if reference in done:
                    continue
                visit(self._definition(reference), (*path, reference))
                done.add(reference)

        _each_node(self.root, lambda node: visit(node, ()))

    def _definition(self, reference: str) -> Any:
        place, name = reference[2:].split("/", 1)
        return self.root.get(place, {}).get(name)


def _direct_references(node: Any) -> list[str]:
    """Where a node leads without consuming anything of a document."""
    if not isinstance(node, dict):
        return []
    if "$ref" in node:
        return [node["$ref"]]
    return [reference for one in node.get("anyOf", ()) for reference in _direct_references(one)]


def _each_node(node: Any, see: Callable[[Any], None]) -> None:
    see(node)
    if not isinstance(node, dict):
        return
    for one in node.get("anyOf", ()):
        _each_node(one, see)
    for key in ("properties", "$defs", "definitions"):
        for one in node.get(key, {}).values():
            _each_node(one, see)
    for key in ("items", "additionalProperties"):
        _each_node(node.get(key), see)


def _is_simple(pattern: Any) -> bool:
    return (
        isinstance(pattern, str)
        and len(pattern) <= PATTERN_CHARS_MAX
        and _SIMPLE_PATTERN.fullmatch(pattern) is not None
    )
