"""Who may do what in schema `auth`: `migrate` gives each role exactly this, and takes away all else."""

from __future__ import annotations

# What the service's own role may do; `migrate` gives it exactly this.
SERVICE_GRANTS = {
    "role": "SELECT",
    "permission": "SELECT",
    "role_permission": "SELECT",
    "plan": "SELECT",
    "user_account": "SELECT, INSERT, UPDATE",
    "user_role": "SELECT, INSERT, DELETE",
    "organization": "SELECT, INSERT, UPDATE",
    "membership": "SELECT, INSERT, UPDATE, DELETE",
    "invitation": "SELECT, INSERT, DELETE",
    "session": "SELECT, INSERT, UPDATE, DELETE",
    "refresh_token": "SELECT, INSERT, UPDATE, DELETE",
    "sign_in_attempt": "SELECT, INSERT, UPDATE, DELETE",
    "api_key": "SELECT, INSERT, UPDATE",
    "key_usage": "SELECT, INSERT, UPDATE, DELETE",
    "key_outbox": "SELECT, INSERT, UPDATE, DELETE",
    "session_outbox": "SELECT, INSERT, UPDATE, DELETE",
    "email_outbox": "SELECT, INSERT, UPDATE, DELETE",
    "email_token": "SELECT, INSERT, DELETE",
    "external_identity": "SELECT, INSERT",
    "oidc_flow": "SELECT, INSERT, DELETE",
    "signing_key": "SELECT, INSERT, UPDATE",
    "audit_log": "SELECT, INSERT",
}
# The gateway reads the views of keys and of sessions, and nothing else.
GATEWAY_GRANTS = {"key_view": "SELECT", "session_view": "SELECT"}
