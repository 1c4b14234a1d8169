"""OpenAI's chat completion body, checked.

Unknown fields are ignored. Fields that OpenAI knows and this server does not serve are refused by name
(`unsupported_parameter`), unless they carry the value that changes nothing: bodies.NEUTRAL lists those.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from services.chat.domain.request import ChatRequest, Limits, Message, Priority, Role, ToolCall
from services.chat.routes.bodies import (
    INT64_MAX,
    METADATA_KEY_CHARS_MAX,
    METADATA_MAX,
    METADATA_VALUE_CHARS_MAX,
    MODEL_CHARS_MAX,
    NAME_CHARS_MAX,
    UNSUPPORTED,
    Body,
    read,
    refuse_unsupported,
)
from services.chat.routes.tools import FormatBody, FunctionName, ToolBody, ToolChoiceBody, document, tool_use
from shared.errors import InvalidRequest

STOP_MAX = 4
STOP_CHARS_MAX = 512
TOP_LOGPROBS_MAX = 20
BIASES_MAX = 300
TOOL_CALLS_MAX = 128
CALL_ID_CHARS_MAX = 64
NO_NUL = r"^[^\x00]*$"  # which the database does not keep

_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
_TIERS = {"priority": Priority.PRIORITY, "flex": Priority.FLEX}

Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=METADATA_KEY_CHARS_MAX, pattern=NO_NUL)],
        Annotated[str, Field(max_length=METADATA_VALUE_CHARS_MAX, pattern=NO_NUL)],
    ],
    Field(max_length=METADATA_MAX),
]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=BIASES_MAX),
]
StopText = Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]
Stop = Annotated[
    Annotated[StopText, Tag("$one")] | Annotated[list[StopText], Field(max_length=STOP_MAX), Tag("$several")],
    Discriminator(lambda v: "$several" if isinstance(v, list) else "$one"),
]


class TextPart(Body):
    """One part of a message's content. Only text is served."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "text":
            raise PydanticCustomError(UNSUPPORTED, "Only parts of type 'text' are supported here.")
        return value


class CalledFunction(Body):
    """What was called, with the arguments as the model wrote them."""

    name: FunctionName
    arguments: str


class ToolCallBody(Body):
    """A call that the assistant made."""

    id: str = Field(min_length=1, max_length=CALL_ID_CHARS_MAX)
    type: Literal["function"]
    function: CalledFunction


Content = Annotated[
    Annotated[str, Tag("$text")] | Annotated[list[TextPart], Tag("$parts")],
    Discriminator(lambda v: "$parts" if isinstance(v, list) else "$text"),
]


class MessageBody(Body):
    """One message of the conversation. `developer` is read as `system`; an assistant's may have calls instead of text.

    A `tool` message answers the call of its `tool_call_id`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(default=None, max_length=NAME_CHARS_MAX)
    tool_calls: list[ToolCallBody] | None = Field(default=None, max_length=TOOL_CALLS_MAX)
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=CALL_ID_CHARS_MAX)
    function_call: Any = Field(default=None, description="Not supported: use tool_calls.")
    audio: Any = Field(default=None, description="Not supported.")

    _unsupported = field_validator("function_call", "audio", mode="before")(refuse_unsupported)

    @field_validator("role", mode="before")
    @classmethod
    def _no_functions(cls, value: Any) -> Any:
        if value == "function":
            raise PydanticCustomError(UNSUPPORTED, "The role 'function' is not supported here; use 'tool'.")
        return value

    @property
    def text(self) -> str | None:
        if isinstance(self.content, list):
            return "".join(p.text for p in self.content)
        return self.content

    def message(self, place: str) -> Message:
        """Raises InvalidRequest for a role without what it needs."""
        if self.role == "tool" and self.tool_call_id is None:
            raise _missing(f"{place}.tool_call_id")
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in self.tool_calls or ())
        if calls and self.role != "assistant":
            raise InvalidRequest("Only an assistant calls tools.", code="invalid_value", param=f"{place}.tool_calls")
        if self.content is None and not calls:
            raise _missing(f"{place}.content")
        return Message(_ROLES[self.role], self.text, self.name, calls, self.tool_call_id)


class StreamOptions(Body):
    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage and no choices.")


class Sampling(Body):
    """How tokens are chosen and when they end: the same for chat and plain completions."""

    model: str = Field(min_length=1, max_length=MODEL_CHARS_MAX, description="A model's alias: see GET /v1/models.")
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events, as it comes.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX, description="The most tokens of each choice.")
    n: int | None = Field(default=None, ge=1, description="How many choices; each is generated by itself.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Biases | None = Field(
        default=None, description="Added to the tokens' logits, by the token's number in the model's vocabulary."
    )
    stop: Stop | None = Field(default=None, description="Up to four strings that end the answer.")
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    user: str | None = Field(default=None, description="Accepted and ignored: the key says who asks.")

    def sampling(self) -> dict[str, Any]:
        """What the engine gets as it is."""
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "logit_bias")
        fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.stop:
            fields["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return fields

    def check(self, limits: Limits) -> None:
        """Raises InvalidRequest for what depends on several fields or on the settings."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream: true.", code="invalid_value", param="stream_options")
        if (self.n or 1) > limits.choices_max:
            raise InvalidRequest(f"n is at most {limits.choices_max} here.", code="invalid_value", param="n")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletionBody(Sampling):
    """OpenAI's chat completion request."""

    messages: list[MessageBody] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT64_MAX,
        description="The most tokens to generate for each choice. Refused when credits do not cover it.",
    )
    max_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX, description="Older name of max_completion_tokens.")
    logprobs: bool | None = Field(default=None, description="Give the log probability of every token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX, description="Goes with logprobs: true.")
    response_format: FormatBody | None = None
    tools: list[ToolBody] | None = Field(default=None, max_length=TOOL_CALLS_MAX)
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = Field(
        default=None, description="`flex` waits behind the others; `priority` is for plans that have it."
    )
    store: bool | None = Field(default=None, description="Keep the completion, for GET /v1/chat/completions.")
    metadata: Metadata | None = Field(default=None, description="Kept with a stored completion.")
    functions: Any = Field(default=None, description="Not supported: use tools.")
    function_call: Any = Field(default=None, description="Not supported: use tool_choice.")
    modalities: Any = Field(default=None, description='Only `["text"]` is supported.')
    audio: Any = Field(default=None, description="Not supported.")
    prediction: Any = Field(default=None, description="Not supported.")
    web_search_options: Any = Field(default=None, description="Not supported.")
    reasoning_effort: Any = Field(default=None, description="Only `none` is supported.")
    verbosity: Any = Field(default=None, description="Only `medium` is supported.")

    _unsupported = field_validator(
        "functions", "function_call", "modalities", "audio", "prediction", "web_search_options",
        "reasoning_effort", "verbosity", mode="before",
    )(refuse_unsupported)  # fmt: skip

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 1}  # for 0 an engine gives none at all
        return fields

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs: true.", code="invalid_value", param="top_logprobs")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; give one of them.",
                code="invalid_value",
                param="max_tokens",
            )


def parse(content: bytes, limits: Limits) -> ChatRequest:
    """The body as a request. Raises InvalidRequest that names the field, as `param`, and never echoes a value."""
    return as_request(read(content, ChatCompletionBody), limits)


def as_request(body: ChatCompletionBody, limits: Limits) -> ChatRequest:
    """A body that was read. Raises InvalidRequest."""
    body.check(limits)
    messages = tuple(m.message(f"messages[{i}]") for i, m in enumerate(body.messages))
    check_sizes(messages, limits)
    return ChatRequest(
        model=body.model,
        messages=messages,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        n=body.n or 1,
        sampling=body.sampling(),
        document=document(body.response_format),
        tool_use=tool_use(body.tools, body.tool_choice, body.parallel_tool_calls),
        stream=bool(body.stream),
        include_usage=body.include_usage,
        priority=_TIERS.get(body.service_tier or "", Priority.DEFAULT),
        store=bool(body.store),
        metadata=body.metadata or {},
    )


def check_sizes(messages: tuple[Message, ...], limits: Limits) -> None:
    """Raises InvalidRequest for too many messages or characters."""
    if len(messages) > limits.messages_max:
        raise InvalidRequest(
            f"There are more than {limits.messages_max} messages.", code="array_above_max_length", param="messages"
        )
    calls = sum(len(c.arguments) for m in messages for c in m.tool_calls)
    if sum(len(m.content or "") for m in messages) + calls > limits.prompt_chars_max:
        raise InvalidRequest(
            f"The messages have more than {limits.prompt_chars_max} characters.",
            code="string_above_max_length",
            param="messages",
        )


def _missing(param: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
