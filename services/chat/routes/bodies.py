"""What every body of /v1 shares: strictness, refusals that name the field, OpenAI's fields that are not served."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from shared.errors import InvalidRequest

UNSUPPORTED = "unsupported_parameter"
MODEL_CHARS_MAX = 256
NAME_CHARS_MAX = 64
INT64_MAX = 2**63 - 1
METADATA_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "truncation": (None, "disabled"),
    "background": (None, False),
    "reasoning": (None, {}),
}

_TAG = "$"  # begins the names of a union's members, which pydantic puts into the place of an error


class Body(BaseModel):
    """Strict: a number is no string, and NaN no number."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


BodyT = TypeVar("BodyT", bound=Body)


def refuse_unsupported(value: Any, info: ValidationInfo) -> Any:
    """A validator (mode before) for fields that OpenAI knows and this server does not serve."""
    name = info.field_name
    assert name is not None
    if not any(type(value) is type(n) and value == n for n in NEUTRAL[name]):
        raise PydanticCustomError(UNSUPPORTED, "'{name}' is not supported here.", {"name": name})
    return value


def read(content: bytes, body: type[BodyT]) -> BodyT:
    """The body. Raises InvalidRequest that names the field, as `param`, and never echoes a value."""
    try:
        return body.model_validate_json(content)
    except ValidationError as e:
        raise _refusal(e.errors(include_url=False, include_input=False)[0]) from None


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
