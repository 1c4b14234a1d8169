"""The parts of a body that say which form the answer must have: response_format, tools, tool_choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from services.chat.domain.request import Tool, ToolUse
from services.chat.domain.schema import ANY_OBJECT, Constraint
from services.chat.routes.bodies import NAME_CHARS_MAX, UNSUPPORTED, Body
from shared.errors import InvalidRequest

TOOLS_MAX = 128
DESCRIPTION_CHARS_MAX = 4_096
FUNCTION_NAME = r"^[A-Za-z0-9_-]+$"

FunctionName = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX, pattern=FUNCTION_NAME)]


def _only_functions(value: Any) -> Any:
    if isinstance(value, str) and value != "function":
        raise PydanticCustomError(UNSUPPORTED, "Only tools of type 'function' are supported here.")
    return value


class FunctionBody(Body):
    """A function's declaration."""

    name: FunctionName
    description: str | None = Field(default=None, max_length=DESCRIPTION_CHARS_MAX)
    parameters: dict[str, Any] | None = Field(default=None, description="The JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Accepted; arguments are checked in any case.")


class ToolBody(Body):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionBody

    _functions = field_validator("type", mode="before")(_only_functions)


class NamedFunction(Body):
    """The function's name."""

    name: FunctionName


class NamedTool(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction

    _functions = field_validator("type", mode="before")(_only_functions)


ToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("$word")] | Annotated[NamedTool, Tag("$named")],
    Discriminator(lambda v: "$named" if isinstance(v, dict | NamedTool) else "$word"),
]


class SchemaBody(Body):
    """OpenAI's wrapping of a JSON schema."""

    name: FunctionName
    description: str | None = Field(default=None, max_length=DESCRIPTION_CHARS_MAX)
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema", description="The JSON schema.")
    strict: bool | None = Field(default=None, description="Accepted; the answer is checked in any case.")


class FormatBody(Body):
    """`text`, `json_object`, or `json_schema` with the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None


def document(body: FormatBody | None) -> Constraint | None:
    """What the answer must satisfy. Raises InvalidRequest (invalid_schema, missing_required_parameter)."""
    if body is None or body.type == "text":
        return None
    if body.type == "json_object":
        return Constraint(ANY_OBJECT, "response_format")
    if body.json_schema is None:
        param = "response_format.json_schema"
        raise InvalidRequest(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    schema = body.json_schema.json_schema
    return Constraint(ANY_OBJECT if schema is None else schema, "response_format.json_schema.schema")


def tool_use(tools: Sequence[ToolBody] | None, choice: str | NamedTool | None, parallel: bool | None) -> ToolUse:
    """The tools and how they are chosen. Raises InvalidRequest."""
    made = tuple(_tool(t.function, f"tools[{i}].function.parameters") for i, t in enumerate(tools or ()))
    if len({t.name for t in made}) < len(made):
        raise InvalidRequest("Two tools have the same name.", code="invalid_value", param="tools")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if all(t.name != name for t in made):
            raise InvalidRequest("tool_choice names no tool that is given.", code="invalid_value", param="tool_choice")
        return ToolUse(made, "required", name, parallel is not False)
    if not made:
        if choice == "required":
            raise InvalidRequest("tool_choice needs tools.", code="invalid_value", param="tool_choice")
        return ToolUse()
    choosing: Literal["none", "auto", "required"] = "auto" if choice is None else choice  # type: ignore[assignment]
    return ToolUse(made, choosing, None, parallel is not False)


def _tool(function: FunctionBody, param: str) -> Tool:
    arguments = None if function.parameters is None else Constraint(function.parameters, param)
    return Tool(function.name, function.description, arguments)
