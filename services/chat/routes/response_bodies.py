"""OpenAI's /v1/responses request, checked and read as a chat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from services.chat.domain.request import ChatRequest, Limits, Message, Priority, Role, ToolCall
from services.chat.routes.bodies import INT64_MAX, MODEL_CHARS_MAX, UNSUPPORTED, Body, read, refuse_unsupported
from services.chat.routes.schemas import CALL_ID_CHARS_MAX, Metadata, check_sizes
from services.chat.routes.tools import (
    DESCRIPTION_CHARS_MAX,
    TOOLS_MAX,
    FormatBody,
    FunctionBody,
    FunctionName,
    NamedFunction,
    NamedTool,
    SchemaBody,
    ToolBody,
    document,
    tool_use,
)

ITEMS_MAX = 1_000
ID_CHARS_MAX = 128
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TIERS = {"priority": Priority.PRIORITY, "flex": Priority.FLEX}


class InputText(Body):
    """A part of a message. Only text is served."""

    type: Literal["input_text", "output_text", "text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if value in ("input_image", "input_file", "input_audio", "refusal"):
            raise PydanticCustomError(UNSUPPORTED, "Only parts of text are supported here.")
        return value


class MessageItem(Body):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("$text")] | Annotated[list[InputText], Tag("$parts")],
        Discriminator(lambda v: "$parts" if isinstance(v, list) else "$text"),
    ]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return Message(_ROLES[self.role], text)


class CallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=CALL_ID_CHARS_MAX)
    name: FunctionName
    arguments: str

    def message(self) -> Message:
        return Message("assistant", None, tool_calls=(ToolCall(self.call_id, self.name, self.arguments),))


class OutputItem(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=CALL_ID_CHARS_MAX)
    output: str

    def message(self) -> Message:
        return Message("tool", self.output, tool_call_id=self.call_id)


def _item_type(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return {"function_call": "$call", "function_call_output": "$output"}.get(str(kind), "$message")


Item = Annotated[
    Annotated[MessageItem, Tag("$message")] | Annotated[CallItem, Tag("$call")] | Annotated[OutputItem, Tag("$output")],
    Discriminator(_item_type),
]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = Field(default=None, max_length=DESCRIPTION_CHARS_MAX)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _only_functions(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "function":
            raise PydanticCustomError(UNSUPPORTED, "Only tools of type 'function' are supported here.")
        return value

    def tool(self) -> ToolBody:
        function = FunctionBody(name=self.name, description=self.description, parameters=self.parameters)
        return ToolBody(type="function", function=function)


class ChosenTool(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(SchemaBody):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName = "answer"


class TextBody(Body):
    """How the answer's text shall be."""

    format: TextFormat | None = None


class ResponseBody(Body):
    """OpenAI's request for a response."""

    model: str = Field(min_length=1, max_length=MODEL_CHARS_MAX, description="A model's alias: see GET /v1/models.")
    input: Annotated[
        Annotated[str, Tag("$text")] | Annotated[list[Item], Field(min_length=1, max_length=ITEMS_MAX), Tag("$items")],
        Discriminator(lambda v: "$items" if isinstance(v, list) else "$text"),
    ]
    instructions: str | None = Field(default=None, description="A system message for this response only.")
    previous_response_id: str | None = Field(default=None, max_length=ID_CHARS_MAX)
    max_output_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stream: bool | None = None
    store: bool | None = Field(default=None, description="True unless it is false, as with OpenAI.")
    metadata: Metadata | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=TOOLS_MAX)
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("$word")] | Annotated[ChosenTool, Tag("$named")],
            Discriminator(lambda v: "$named" if isinstance(v, dict | ChosenTool) else "$word"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    truncation: Any = Field(default=None, description="Only `disabled` is supported.")
    background: Any = Field(default=None, description="Only false is supported.")
    reasoning: Any = Field(default=None, description="Not supported.")

    _unsupported = field_validator("truncation", "background", "reasoning", mode="before")(refuse_unsupported)


@dataclass(frozen=True, slots=True)
class Asked:
    """A valid request: the chat that it is, and what the response says about it. `said` is the input as messages."""

    body: ResponseBody
    said: tuple[Message, ...]

    def chat(self, history: tuple[Message, ...], limits: Limits) -> ChatRequest:
        """With the conversation before it. Raises InvalidRequest."""
        body = self.body
        first = (Message("system", body.instructions),) if body.instructions is not None else ()
        messages = (*first, *history, *self.said)
        check_sizes(messages, limits)
        choice: Any = body.tool_choice
        if isinstance(choice, ChosenTool):
            choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
        shown = (("temperature", body.temperature), ("top_p", body.top_p))
        return ChatRequest(
            model=body.model,
            messages=messages,
            max_tokens=body.max_output_tokens,
            sampling={name: value for name, value in shown if value is not None},
            document=document(self._format()),
            tool_use=tool_use([t.tool() for t in body.tools or ()], choice, body.parallel_tool_calls),
            stream=bool(body.stream),
            priority=_TIERS.get(body.service_tier or "", Priority.DEFAULT),
            store=body.store is not False,
            metadata=body.metadata or {},
        )

    def _format(self) -> FormatBody | None:
        wanted = self.body.text.format if self.body.text is not None else None
        if wanted is None:
            return None
        return FormatBody(type=wanted.type, json_schema=wanted if wanted.type == "json_schema" else None)


def parse(content: bytes) -> Asked:
    """The body. Raises InvalidRequest that names the field."""
    body = read(content, ResponseBody)
    said = (Message("user", body.input),) if isinstance(body.input, str) else tuple(_joined(body.input))
    return Asked(body, said)


def _joined(items: list[MessageItem | CallItem | OutputItem]) -> Iterator[Message]:
    """The items as messages: neighbouring calls are one message's."""
    calls: tuple[ToolCall, ...] = ()
    for item in items:
        message = item.message()
        if message.tool_calls:
            calls += message.tool_calls
            continue
        if calls:
            yield Message("assistant", None, tool_calls=calls)
            calls = ()
        yield message
    if calls:
        yield Message("assistant", None, tool_calls=calls)
