"""What the gateway knows about an API key: one row of auth's view, in the form in which it is cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared import apikeys
from shared.identity import Identity
from shared.limits.policy import Limits, Subject

ACTIVE = "active"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key, its owner and what it may do. `models` None means all; `expires_at` None means never."""

    digest: str
    pepper: int
    key_id: str
    limit_id: str
    org_id: str
    user_id: str
    plan: str
    roles: tuple[str, ...]
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None
    limits: Limits
    tokens_per_minute: int
    version: int
    status: str
    expires_at: datetime | None

    @property
    def subject(self) -> Subject:
        """Whose limits a request with this key draws on; admission needs a positive match of the version."""
        return Subject(
            tag=self.org_id,
            limit_id=self.limit_id,
            limits=self.limits,
            version_name=apikeys.version_name(self.org_id, self.key_id),
            version=str(self.version),
        )

    def is_usable(self, now: datetime) -> bool:
        """Judged at every use: active, and not past its expiry."""
        return self.status == ACTIVE and (self.expires_at is None or now < self.expires_at)

    def identity(self, address: str) -> Identity:
        return Identity(
            kind="key",
            user_id=self.user_id,
            org_id=self.org_id,
            key_id=self.key_id,
            plan=self.plan,
            roles=self.roles,
            scopes=self.scopes,
            models=self.models,
            tokens_per_minute=self.tokens_per_minute,
            limit_id=self.limit_id,
            address=address,
        )


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as auth's view has it."""

    user_id: str
    org_id: str
    version: int
    status: str
    expires_at: datetime

    def carries(self, identity: Identity, version: int, now: datetime) -> bool:
        """Whether an access token of this version, for this person in this organisation, stands."""
        return (
            (self.user_id, self.org_id) == (identity.user_id, identity.org_id)
            and self.version == version
            and self.status == ACTIVE
            and now < self.expires_at
        )


def record_from_row(row: Mapping[str, Any]) -> KeyRecord:
    """From a row of auth.key_view, or the same as JSON; raises KeyError, TypeError or ValueError for anything else."""
    limits = row["limits"] if isinstance(row["limits"], dict) else json.loads(row["limits"])
    expires_at = row["expires_at"]
    return KeyRecord(
        digest=row["digest"],
        pepper=int(row["pepper"]),
        key_id=str(row["key_id"]),
        limit_id=str(row["limit_id"]),
        org_id=str(row["org_id"]),
        user_id=str(row["user_id"]),
        plan=row["plan"],
        roles=tuple(row["roles"]),
        scopes=tuple(row["scopes"]),
        models=None if row["models"] is None else tuple(row["models"]),
        limits=Limits.from_record(limits),
        tokens_per_minute=int(limits.get("tokens_per_minute") or 0),
        version=int(row["version"]),
        status=row["status"],
        expires_at=datetime.fromisoformat(expires_at) if isinstance(expires_at, str) else expires_at,
    )


def record_to_json(record: KeyRecord) -> str:
    """What is kept in Redis under `apikeys.record_name`."""
    return json.dumps(
        {
            "v": apikeys.RECORD_VERSION,
            "digest": record.digest,
            "pepper": record.pepper,
            "key_id": record.key_id,
            "limit_id": record.limit_id,
            "org_id": record.org_id,
            "user_id": record.user_id,
            "plan": record.plan,
            "roles": record.roles,
            "scopes": record.scopes,
            "models": record.models,
            "limits": {
                "minute": record.limits.minute,
                "hour": record.limits.hour,
                "day": record.limits.day,
                "concurrency": record.limits.concurrency,
                "tokens_per_minute": record.tokens_per_minute,
            },
            "version": record.version,
            "status": record.status,
            "expires_at": record.expires_at.isoformat() if record.expires_at else None,
        },
        separators=(",", ":"),
    )


def record_from_json(data: bytes) -> KeyRecord | None:
    """The inverse of `record_to_json`; None for another version or anything that cannot be read."""
    try:
        row = json.loads(data)
        if row["v"] != apikeys.RECORD_VERSION:
            return None
        return record_from_row(row)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
