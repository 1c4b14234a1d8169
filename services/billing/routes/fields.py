"""Field types of bodies and answers that several routes share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from services.billing.domain import parse_credits
from shared.errors import InvalidRequest

CREDITS_CHARS_MAX = 20
PAGE_DEFAULT = 50
PAGE_MAX = 200
TIME_MIN = datetime(2000, 1, 1, tzinfo=UTC)
TIME_MAX = datetime(2200, 1, 1, tzinfo=UTC)


def _nano(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError('is a decimal string of credits, such as "12.5".')
    try:
        return parse_credits(str(value)[: CREDITS_CHARS_MAX + 1])
    except InvalidRequest as e:
        raise ValueError(e.message) from None


def _positive(value: int) -> int:
    if value <= 0:
        raise ValueError("is more than 0.")
    return value


def _usual_class(value: str) -> str:
    kind, _, org_id = value.partition(":")
    if kind == "org":
        try:
            return f"org:{UUID(org_id)}"
        except ValueError:
            raise ValueError("of an organisation is org: and its id.") from None
    return value


def _usual(value: datetime) -> datetime:
    if not TIME_MIN <= value <= TIME_MAX:
        raise ValueError(f"lies between the years {TIME_MIN.year} and {TIME_MAX.year}.")
    return value.astimezone(UTC)


# With an offset, and far from what calendars and time zones cannot express.
Timestamp = Annotated[AwareDatetime, AfterValidator(_usual)]
# In: a decimal string (or a whole number) of credits, read as nano-credits. Floats are refused: they are not exact.
CreditsIn = Annotated[int, BeforeValidator(_nano, json_schema_input_type=str)]
PositiveCreditsIn = Annotated[CreditsIn, AfterValidator(_positive)]
Model = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:/-]+$")]
CustomerClass = Annotated[
    str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$"), AfterValidator(_usual_class)
]
Reason = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
PageSize = Annotated[int, Field(ge=1, le=PAGE_MAX)]


class Body(BaseModel):
    """A request's body. Strict about names: a misspelt field must not silently mean its default."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
