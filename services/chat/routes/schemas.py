"""OpenAI's chat completion body, checked.

Unknown fields are ignored. Fields that OpenAI knows and this server does not serve yet are refused by name
(`unsupported_parameter`), unless they carry the value that changes nothing: NEUTRAL lists those.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from services.chat.domain import ChatRequest, Limits, Message, Role
from shared.errors import InvalidRequest

UNSUPPORTED = "unsupported_parameter"
STOP_MAX = 4
STOP_CHARS_MAX = 512
MODEL_CHARS_MAX = 256
NAME_CHARS_MAX = 64
INT64_MAX = 2**63 - 1

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
}

_TAG = "$"  # begins the names of a union's members, which pydantic puts into the place of an error
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _is_neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(n) and value == n for n in NEUTRAL[name])


def _refuse_unsupported(value: Any, info: ValidationInfo) -> Any:
    name = info.field_name
    assert name is not None
    if not _is_neutral(name, value):
        raise PydanticCustomError(UNSUPPORTED, "'{name}' is not supported here yet.", {"name": name})
    return value


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(_Body):
    """One part of a message's content. Only text is served yet."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "text":
            raise PydanticCustomError(UNSUPPORTED, "Only parts of type 'text' are supported here yet.")
        return value


class MessageBody(_Body):
    """One message of the conversation. `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("$text")] | Annotated[list[TextPart], Tag("$parts")],
        Discriminator(lambda v: "$parts" if isinstance(v, list) else "$text"),
    ]
    name: str | None = Field(default=None, max_length=NAME_CHARS_MAX)
    tool_calls: Any = Field(default=None, description="Not supported yet.")
    tool_call_id: Any = Field(default=None, description="Not supported yet.")
    function_call: Any = Field(default=None, description="Not supported yet.")
    audio: Any = Field(default=None, description="Not supported yet.")

    _unsupported = field_validator("tool_calls", "tool_call_id", "function_call", "audio", mode="before")(
        _refuse_unsupported
    )

    @field_validator("role", mode="before")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise PydanticCustomError(UNSUPPORTED, "The role '{role}' is not supported here yet.", {"role": value})
        return value

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(_Body):
    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage and no choices.")


class ChatCompletionBody(_Body):
    """OpenAI's chat completion request."""

    model: str = Field(min_length=1, max_length=MODEL_CHARS_MAX, description="A model's alias: see GET /v1/models.")
    messages: list[MessageBody] = Field(min_length=1)
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events, as it comes.")
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT64_MAX,
        description="The most tokens to generate. Refused when credits do not cover it.",
    )
    max_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX, description="Older name of max_completion_tokens.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: (
        Annotated[
            Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX), Tag("$one")]
            | Annotated[
                list[Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]],
                Field(max_length=STOP_MAX),
                Tag("$several"),
            ],
            Discriminator(lambda v: "$several" if isinstance(v, list) else "$one"),
        ]
        | None
    ) = Field(default=None, description="Up to four strings that end the answer.")
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    user: str | None = Field(default=None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(default=None, description="Accepted and ignored.")
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted and ignored.")
    n: Any = Field(default=None, description="Only 1 is supported yet.")
    logprobs: Any = Field(default=None, description="Only false is supported yet.")
    top_logprobs: Any = Field(default=None, description="Only 0 is supported yet.")
    logit_bias: Any = Field(default=None, description="Not supported yet.")
    tools: Any = Field(default=None, description="Not supported yet.")
    tool_choice: Any = Field(default=None, description="Only `none` and `auto` are supported yet.")
    functions: Any = Field(default=None, description="Not supported yet.")
    function_call: Any = Field(default=None, description="Not supported yet.")
    response_format: Any = Field(default=None, description='Only `{"type": "text"}` is supported yet.')
    modalities: Any = Field(default=None, description='Only `["text"]` is supported yet.')
    audio: Any = Field(default=None, description="Not supported yet.")
    prediction: Any = Field(default=None, description="Not supported yet.")
    web_search_options: Any = Field(default=None, description="Not supported yet.")
    store: Any = Field(default=None, description="Only false is supported yet.")
    service_tier: Any = Field(default=None, description="Only `auto` and `default` are supported yet.")
    reasoning_effort: Any = Field(default=None, description="Only `none` is supported yet.")
    verbosity: Any = Field(default=None, description="Only `medium` is supported yet.")

    _unsupported = field_validator(
        "n", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "functions", "function_call",
        "response_format", "modalities", "audio", "prediction", "web_search_options", "store", "service_tier",
        "reasoning_effort", "verbosity", mode="before",
    )(_refuse_unsupported)  # fmt: skip


def parse(content: bytes, limits: Limits) -> ChatRequest:
    """The body as a request. Raises InvalidRequest that names the field, as `param`, and never echoes a value."""
    try:
        body = ChatCompletionBody.model_validate_json(content)
    except ValidationError as e:
        raise _refusal(e.errors(include_url=False, include_input=False)[0]) from None
    _check_sizes(body, limits)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes with stream: true.", code="invalid_value", param="stream_options")
    return ChatRequest(
        model=body.model,
        messages=tuple(Message(_ROLES[m.role], m.text, m.name) for m in body.messages),
        max_tokens=_max_tokens(body),
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        seed=body.seed,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )


def _max_tokens(body: ChatCompletionBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens differ; give one of them.", code="invalid_value", param="max_tokens"
        )
    return old if new is None else new


def _check_sizes(body: ChatCompletionBody, limits: Limits) -> None:
    if len(body.messages) > limits.messages_max:
        raise InvalidRequest(
            f"There are more than {limits.messages_max} messages.", code="array_above_max_length", param="messages"
        )
    if sum(len(m.text) for m in body.messages) > limits.prompt_chars_max:
        raise InvalidRequest(
            f"The messages have more than {limits.prompt_chars_max} characters.",
            code="string_above_max_length",
            param="messages",
        )


def _refusal(problem: ErrorDetails) -> InvalidRequest:
    kind, param = problem["type"], _param(problem["loc"])
    if kind == "json_invalid":
        return InvalidRequest("The body is not valid JSON.", code="invalid_json")
    if kind == UNSUPPORTED:
        return InvalidRequest(problem["msg"], code=UNSUPPORTED, param=param)
    if param is None:
        return InvalidRequest("The body must be a JSON object.", code="invalid_type")
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return InvalidRequest(f"Invalid value for '{param}': {problem['msg']}.", code=code, param=param)


def _param(place: tuple[int | str, ...]) -> str | None:
    """pydantic's place as OpenAI writes it: messages[0].content[1].text."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith(_TAG):
            text += f".{part}" if text else part
    return text or None
