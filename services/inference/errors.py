"""Errors of this service.

CatalogueInvalid     catalogue.toml cannot be used; the message names the place
TritonError          something that Triton answered, or did not
├── TritonUnreachable    no server, or none that answers in time
├── LoadFailed           the server refused to load a build
├── BuildSilent          a loaded build did not answer in time: its process is dead, hung, or very busy
│   └── BuildDead        Triton itself says that the build's process is gone
└── BuildRefused         a loaded build answered with an error of its own: it is alive
    └── Contradiction        its configuration is not what the catalogue says
"""

from __future__ import annotations


class CatalogueInvalid(Exception):
    pass


class TritonError(Exception):
    """The message is one sentence for an operator; it names no secret."""


class TritonUnreachable(TritonError):
    pass


class LoadFailed(TritonError):
    pass


class BuildSilent(TritonError):
    pass


class BuildDead(BuildSilent):
    pass


class BuildRefused(TritonError):
    """`code` is one of services/inference/backend/errors.py's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Contradiction(BuildRefused):
    pass
