"""Field types of bodies and answers that several routes share. What they refuse says which rule was broken."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from services.auth.domain import LIMIT_MAX
from services.auth.domain.fields import (
    PASSWORD_CHARS_MAX,
    has_control_characters,
    valid_email,
    valid_key_name,
    valid_model,
    valid_network,
    valid_username,
)
from shared.errors import TollgateError

LOGIN_CHARS_MAX = 254
TOKEN_CHARS_MAX = 256
MODELS_MAX = 100
SCOPES_MAX = 20
NETWORKS_MAX = 50


def _printable(value: str) -> str:
    if has_control_characters(value):
        raise ValueError("control characters are not allowed.")
    return value


Username = Annotated[str, AfterValidator(valid_username)]
Email = Annotated[str, Field(max_length=LOGIN_CHARS_MAX), AfterValidator(valid_email)]
Login = Annotated[str, Field(min_length=1, max_length=LOGIN_CHARS_MAX), AfterValidator(_printable)]
# The rules of domain.check_password give the exact answer at registration; here only the work is bounded.
Password = Annotated[str, Field(max_length=8 * PASSWORD_CHARS_MAX)]
RefreshToken = Annotated[str, Field(min_length=1, max_length=TOKEN_CHARS_MAX, pattern=r"^[A-Za-z0-9_-]+$")]
LeakedKey = Annotated[str, Field(min_length=1, max_length=TOKEN_CHARS_MAX), AfterValidator(_printable)]
KeyName = Annotated[str, AfterValidator(valid_key_name)]
Scopes = Annotated[list[str], Field(min_length=1, max_length=SCOPES_MAX)]
Models = Annotated[list[Annotated[str, AfterValidator(valid_model)]], Field(max_length=MODELS_MAX)]
Networks = Annotated[
    list[Annotated[str, Field(max_length=64), AfterValidator(valid_network)]],
    Field(min_length=1, max_length=NETWORKS_MAX),
]
Timestamp = AwareDatetime


class Body(BaseModel):
    """A request's body. Strict about names: a misspelt field must not silently mean its default."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class LimitsBody(Body):
    """A key's own limits; what is left out keeps its value, null gives the plan's back."""

    minute: int | None = Field(None, ge=1, le=LIMIT_MAX["minute"], description="Requests in any 60 s.")
    hour: int | None = Field(None, ge=1, le=LIMIT_MAX["hour"], description="Requests in any hour.")
    day: int | None = Field(None, ge=1, le=LIMIT_MAX["day"], description="Requests in any 24 hours.")
    concurrency: int | None = Field(None, ge=1, le=LIMIT_MAX["concurrency"], description="Requests at once.")
    tokens_per_minute: int | None = Field(
        None, ge=0, le=LIMIT_MAX["tokens_per_minute"], description="Tokens in any 60 s; 0 is no limit."
    )

    def given(self) -> dict[str, int | None]:
        """The fields that the body named."""
        return self.model_dump(exclude_unset=True)


class LimitsAnswer(BaseModel):
    """Effective limits: the key's own, else its plan's."""

    minute: int
    hour: int
    day: int
    concurrency: int
    tokens_per_minute: int


class Problem(BaseModel):
    """RFC 9457 problem details; `code` is stable, `param` names the field at fault."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    param: str | None = None


def refusals(*errors: type[TollgateError]) -> dict[int | str, dict[str, Any]]:
    """The documented refusals of a route, and the shape of all others."""
    codes: dict[int, list[str]] = {}
    for error in errors:
        codes.setdefault(error.status, []).append(error.default_code)
    shape = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": f"Codes: {', '.join(names)}.", "content": shape} for status, names in codes.items()
    }
    return {**documented, "default": {"model": Problem, "description": "Refused; `code` says why."}}
