"""Roles as the command line names them, and what keys of theirs may do by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from services.auth.domain import DEFAULT_KEY_SCOPES


class Role(StrEnum):
    user = "user"
    operator = "operator"
    admin = "admin"


DEFAULT_SCOPES: Mapping[Role, Sequence[str]] = {
    Role.user: DEFAULT_KEY_SCOPES,
    Role.operator: ("admin", "*"),
    Role.admin: ("admin", "*"),
}
