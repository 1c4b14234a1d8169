"""The file of list prices: [[price]] tables with model, customer_class, per_request, input, cached_input, output.

Amounts are decimal strings of credits: per request, and per million tokens of a class. TOML's floats are refused,
since they are not exact.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from services.billing.domain import DEFAULT_CLASS, PriceTerms, parse_credits
from shared.errors import InvalidRequest

FILE_BYTES_MAX = 1024 * 1024
_FIELDS = {"model", "customer_class", "per_request", "input", "cached_input", "output"}


class PriceFileError(ValueError):
    """The file cannot be used; the message says which table and why."""


def read_prices(file: Path) -> list[tuple[str, str, PriceTerms]]:
    """(model, customer class, terms) of each table. Raises PriceFileError."""
    if file.stat().st_size > FILE_BYTES_MAX:
        raise PriceFileError(f"{file} is larger than {FILE_BYTES_MAX} bytes.")
    try:
        tables = tomllib.loads(file.read_text()).get("price")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise PriceFileError(f"{file} is not TOML: {e}") from None
    if not isinstance(tables, list) or not tables:
        raise PriceFileError(f"{file} has no [[price]] table.")
    prices = [_price(number, table) for number, table in enumerate(tables, 1)]
    names = [price[:2] for price in prices]
    for name in names:
        if names.count(name) > 1:
            raise PriceFileError(f"{name[0]} ({name[1]}) has two prices.")
    return prices


def _price(number: int, table: object) -> tuple[str, str, PriceTerms]:
    if not isinstance(table, dict) or not isinstance(table.get("model"), str) or not table["model"]:
        raise PriceFileError(f"[[price]] {number} has no model.")
    model, customer_class = table["model"], table.get("customer_class", DEFAULT_CLASS)
    unknown = ", ".join(sorted(table.keys() - _FIELDS))
    if unknown or not isinstance(customer_class, str):
        raise PriceFileError(f"{model}: unknown or wrong: {unknown or 'customer_class'}.")
    amounts = []
    for name in ("per_request", "input", "cached_input", "output"):
        value = table.get(name, "0" if name == "per_request" else None)
        if not isinstance(value, str):
            raise PriceFileError(f'{model}: {name} is a decimal string of credits, such as "0.5".')
        try:
            amounts.append(parse_credits(value))
        except InvalidRequest as e:
            raise PriceFileError(f"{model}: {name}: {e.message}") from None
    try:
        return model, customer_class, PriceTerms(*amounts)
    except InvalidRequest as e:
        raise PriceFileError(f"{model}: {e.message}") from None
