"""What people may type: names, addresses, passwords. Each function gives the normal form, or says which rule broke."""

from __future__ import annotations

import re
import unicodedata
from ipaddress import ip_network

from email_validator import EmailNotValidError, validate_email

from services.auth.domain import LIMIT_MAX
from services.auth.errors import WeakPassword
from shared.errors import InvalidRequest

USERNAME_CHARS_MIN, USERNAME_CHARS_MAX = 3, 64
PASSWORD_CHARS_MIN, PASSWORD_CHARS_MAX = 8, 128
KEY_NAME_CHARS_MAX = 100
_USERNAME = re.compile(r"[A-Za-z0-9._-]+")
_PUBLIC_SUFFIX = ".example.com"
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
# The commonest passwords of public leaks that are long enough to pass the length rule.
COMMON_PASSWORDS = frozenset(
    (
        *("password", "password1", "password123", "passw0rd", "p@ssw0rd", "12345678", "123456789", "1234567890"),
        *("11111111", "00000000", "87654321", "qwertyui", "qwerty123", "qwertyuiop", "1q2w3e4r", "1qaz2wsx"),
        *("iloveyou", "sunshine", "princess", "football", "baseball", "superman", "trustno1", "letmein1"),
        *("welcome1", "abcd1234", "abc12345", "changeme", "administrator", "asdfghjkl"),
    )
)


def valid_username(value: str) -> str:
    """The name, or ValueError with the rule it breaks."""
    if not USERNAME_CHARS_MIN <= len(value) <= USERNAME_CHARS_MAX or not _USERNAME.fullmatch(value):
        raise ValueError(f"use {USERNAME_CHARS_MIN} to {USERNAME_CHARS_MAX} of A-Z, a-z, 0-9, dot, hyphen, underscore.")
    return value


def valid_email(value: str) -> str:
    """The address in its normal form, or ValueError. Private domains are fine: an installation may be internal."""
    try:
        # The library refuses reserved domains (localhost, .test, .local). Below a public one they pass its syntax.
        checked = validate_email(value + _PUBLIC_SUFFIX, check_deliverability=False).normalized
    except EmailNotValidError as e:
        raise ValueError("give a valid e-mail address.") from e
    return checked.removesuffix(_PUBLIC_SUFFIX)


def valid_key_name(value: str) -> str:
    """The name without outer blanks, or ValueError."""
    value = value.strip()
    if not 1 <= len(value) <= KEY_NAME_CHARS_MAX or has_control_characters(value):
        raise ValueError(f"use 1 to {KEY_NAME_CHARS_MAX} printable characters.")
    return value


def valid_model(value: str) -> str:
    """The name of a model, or ValueError."""
    if not _MODEL.fullmatch(value):
        raise ValueError("a model's name has 1 to 128 letters, digits, or . _ : / -")
    return value


def valid_limit(value: str) -> tuple[str, int]:
    """A limit of a key as the command line has it, `minute=600`: its name and its number; or ValueError."""
    name, _, number = value.partition("=")
    most = LIMIT_MAX.get(name)
    if most is None or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= most:
        raise ValueError(f"a limit is NAME=NUMBER, such as minute=600; names are {', '.join(LIMIT_MAX)}.")
    return name, int(number)


def valid_network(value: str) -> str:
    """A network in its normal form, "192.0.2.0/24", or of one address; or ValueError."""
    try:
        return str(ip_network(value.strip(), strict=False))
    except ValueError as e:
        raise ValueError("give addresses or networks such as 192.0.2.0/24 or 2001:db8::/32.") from e


def has_control_characters(value: str) -> bool:
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in value)


def normalised_password(password: str) -> str:
    """The password as it is hashed: NFKC (NIST SP 800-63B §5.1.1.2), so that every keyboard types the same one."""
    return unicodedata.normalize("NFKC", password)


def check_password(password: str, *, username: str, email: str, field: str = "password") -> None:
    """Raise InvalidRequest for a wrong length, WeakPassword for what is guessed first. No composition rules."""
    if not PASSWORD_CHARS_MIN <= len(password) <= PASSWORD_CHARS_MAX:
        raise InvalidRequest(
            f"{field}: use {PASSWORD_CHARS_MIN} to {PASSWORD_CHARS_MAX} characters.",
            code="password_length",
            param=field,
        )
    folded = password.casefold()
    if folded in COMMON_PASSWORDS or folded in (username.casefold(), email.casefold()):
        raise WeakPassword(f"{field}: choose one that is harder to guess.", param=field)
