"""Credits as clients read them: exact decimal strings of int64 nano-credits (10^-9 credit). One form everywhere."""

from __future__ import annotations

NANO_PER_CREDIT = 10**9

_FRACTION_DIGITS_MIN = 2


def format_credits(nano: int) -> str:
    """Nano-credits as exact decimal credits: at least two decimals, at most nine ("99.99937", "100.00")."""
    whole, fraction = divmod(abs(nano), NANO_PER_CREDIT)
    digits = f"{fraction:09d}".rstrip("0").ljust(_FRACTION_DIGITS_MIN, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{digits}"
