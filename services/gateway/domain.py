"""What the gateway knows about an API key: one row of auth's view, in the form in which it is cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from services.gateway.addresses import is_within
from shared import apikeys
from shared.identity import Identity
from shared.limits.policy import Limits, Subject

ACTIVE = "active"
ADDRESSES_KEPT_MAX = 16


class Ceilings(NamedTuple):
    """What bounds all requests of a user in an organisation, and all of the organisation; None for no such bound."""

    user: Limits | None = None
    organization: Limits | None = None

    def subjects(self, org_id: str, user_id: str) -> tuple[Subject, ...]:
        """Their subjects, in the organisation's slot."""
        found = []
        if self.user is not None:
            found.append(Subject(org_id, f"all-of-{user_id}", self.user, owner="user"))
        if self.organization is not None:
            found.append(Subject(org_id, "all", self.organization, owner="organization"))
        return tuple(found)


@dataclass(frozen=True)
class KeyRecord:
    """A key, its owner and what it may do.

    `models` None means all; `allowed_addresses` None means any, else networks (CIDR); `expires_at` None means never.
    `user_ceiling` and `organization_ceiling` bound all keys of the user in this organisation, and all of it together.
    """

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
    allowed_addresses: tuple[str, ...] | None = None
    user_ceiling: Limits | None = None
    organization_ceiling: Limits | None = None

    def subject(self, installation: Ceilings) -> Subject:
        """Whose limits a request with this key draws on; admission needs a positive match of the version.

        The key's own ceilings (its plan's) count before the installation's.
        """
        subject = self._subjects.get(installation)
        if subject is None:
            ceilings = Ceilings(
                self.user_ceiling or installation.user, self.organization_ceiling or installation.organization
            )
            subject = self._subjects[installation] = Subject(
                tag=self.org_id,
                limit_id=self.limit_id,
                limits=self.limits,
                version_name=apikeys.version_name(self.org_id, self.key_id),
                version=str(self.version),
                ceilings=ceilings.subjects(self.org_id, self.user_id),
            )
        return subject

    @cached_property
    def _subjects(self) -> dict[Ceilings, Subject]:
        return {}

    def is_usable(self, now: datetime) -> bool:
        """Judged at every use: active, and not past its expiry."""
        return self.status == ACTIVE and (self.expires_at is None or now < self.expires_at)

    def may_be_used_from(self, address: str) -> bool:
        return self.allowed_addresses is None or is_within(address, self.allowed_addresses)

    def identity(self, address: str) -> Identity:
        """Who asks, from that address; kept, since most requests with a key come from few."""
        identity = self._identities.get(address)
        if identity is None:
            if len(self._identities) >= ADDRESSES_KEPT_MAX:
                self._identities.clear()
            identity = self._identities[address] = Identity(
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
        return identity

    @cached_property
    def _identities(self) -> dict[str, Identity]:
        return {}


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
    allowed = row.get("allowed_addresses")
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
        allowed_addresses=None if allowed is None else tuple(str(network) for network in allowed),
        user_ceiling=Limits.ceiling(limits.get("user") or {}),
        organization_ceiling=Limits.ceiling(limits.get("organization") or {}),
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
                **record.limits.to_record(),
                "tokens_per_minute": record.tokens_per_minute,
                "user": record.user_ceiling.to_record() if record.user_ceiling else None,
                "organization": record.organization_ceiling.to_record() if record.organization_ceiling else None,
            },
            "version": record.version,
            "status": record.status,
            "expires_at": record.expires_at.isoformat() if record.expires_at else None,
            "allowed_addresses": record.allowed_addresses,
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
