"""What auth may answer beyond the shared errors: each with its stable code and a sentence that says what to do."""

from __future__ import annotations

from shared.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    Unauthenticated,
    Unavailable,
)


class InvalidCredentials(Unauthenticated):
    """One answer for an unknown user, a wrong password and a disabled account."""

    default_code = "invalid_credentials"
    default_message = "The user name or the password is wrong."


class InvalidRefreshToken(Unauthenticated):
    """One answer for an unknown, used, expired or revoked refresh token."""

    default_code = "invalid_refresh_token"
    default_message = "The refresh token is not valid any more. Sign in again."


class SessionEnded(Unauthenticated):
    default_code = "session_ended"
    default_message = "This session has ended. Sign in again."


class SignInBlocked(RateLimited):
    """The same for a name that exists and one that does not."""

    default_code = "sign_in_blocked"
    default_message = "Too many failed sign-ins. Wait as long as Retry-After says."


class WrongPassword(PermissionDenied):
    default_code = "wrong_password"
    default_message = "old_password: this is not the present password."


class PasswordQueueFull(Unavailable):
    default_code = "sign_in_busy"
    default_message = "Too many sign-ins at the moment. Retry shortly."


class StorageUnavailable(Unavailable):
    """PostgreSQL is away, or too busy for this request to get its turn."""

    default_code = "storage_unavailable"
    default_message = "The service cannot reach its data right now. Retry shortly."


class UsernameTaken(Conflict):
    default_code = "username_taken"
    default_message = "username: this name is taken; choose another."


class EmailTaken(Conflict):
    default_code = "email_taken"
    default_message = "email: this address is registered already; sign in instead."


class KeyNotFound(NotFound):
    """Also for keys of another organisation: whether they exist is not the caller's business."""

    default_code = "key_not_found"
    default_message = "There is no such API key."


class SessionNotFound(NotFound):
    default_code = "session_not_found"
    default_message = "There is no such session."


class UserNotFound(NotFound):
    default_code = "user_not_found"
    default_message = "There is no such user."


class OrganizationNotFound(NotFound):
    """Also for organisations that the caller does not belong to."""

    default_code = "organization_not_found"
    default_message = "There is no such organisation."


class MemberNotFound(NotFound):
    default_code = "member_not_found"
    default_message = "This organisation has no such member."


class ServiceAccountNotFound(NotFound):
    default_code = "service_account_not_found"
    default_message = "This organisation has no such service account."


class TooManyServiceAccounts(Conflict):
    default_code = "too_many_service_accounts"
    default_message = "This organisation has as many service accounts as it may have. Remove some first."


class InvitationNotFound(NotFound):
    default_code = "invitation_not_found"
    default_message = "This organisation has no such invitation."


class InvalidInvitation(InvalidRequest):
    """One answer for an unknown, used, withdrawn or expired token."""

    default_code = "invalid_invitation"
    default_message = "token: this invitation is not valid any more; ask for a new one."


class NotAllowedInOrganization(PermissionDenied):
    default_code = "not_allowed_in_organization"
    default_message = "Your role in this organisation does not allow this."


class OrganizationsByOperators(PermissionDenied):
    default_code = "organizations_by_operators"
    default_message = "Here only operators make organisations. Ask one to make yours and to invite you."


class NotKeyOwner(PermissionDenied):
    """A key acts for its owner: nobody else gets a secret of theirs."""

    default_code = "not_key_owner"
    default_message = "Only its owner may rotate a key; revoke it instead."


class LastOwner(Conflict):
    default_code = "last_owner"
    default_message = "An organisation needs an owner; make somebody else one first."


class TooManyOrganizations(Conflict):
    default_code = "too_many_organizations"
    default_message = "You belong to as many organisations as a person may."


class TooManyMembers(Conflict):
    default_code = "too_many_members"
    default_message = "This organisation has as many members as it may have."


class TooManyInvitations(Conflict):
    default_code = "too_many_invitations"
    default_message = "This organisation has as many open invitations as it may have. Withdraw some first."


class KeyNotActive(Conflict):
    default_code = "key_not_active"
    default_message = "This API key is revoked or expired and cannot change any more. Create a new one."


class TooManyKeys(Conflict):
    default_code = "too_many_keys"
    default_message = "This organisation has as many active API keys as it may have. Revoke some first."


class ScopeNotHeld(PermissionDenied):
    """A key never grants what its maker may not do."""

    default_code = "scope_not_held"
    default_message = "An API key may not have a scope that you do not have yourself."


class ModelNotHeld(PermissionDenied):
    default_code = "model_not_held"
    default_message = "An API key may not reach models that the key that makes it cannot reach."


class BeyondOwnKey(PermissionDenied):
    """A key never makes or changes a key into one that reaches further than itself."""

    default_code = "beyond_own_key"
    default_message = "A key may not give another one higher limits, more addresses or a longer life than its own."


class LimitAbovePlan(PermissionDenied):
    default_code = "limit_above_plan"
    default_message = "A limit may only be lowered from the plan's; ask an operator to raise it."


class WeakPassword(InvalidRequest):
    default_code = "weak_password"
    default_message = "password: choose one that is harder to guess."


class CsrfFailed(PermissionDenied):
    default_code = "csrf_failed"
    default_message = "Send the value of the csrf cookie as x-csrf-token."


class ProviderNotFound(NotFound):
    default_code = "provider_not_found"
    default_message = "There is no such provider to sign in through."


class OidcRefused(Unauthenticated):
    """One answer for whatever is wrong with what came back from a provider."""

    default_code = "sign_in_refused"
    default_message = "This sign-in was not accepted. Begin again."


class OidcUnavailable(Unavailable):
    default_code = "provider_unavailable"
    default_message = "The provider does not answer as it should. Retry, or sign in otherwise."


class AccountExists(Conflict):
    default_code = "account_exists"
    default_message = "There is an account with this address already; sign in to it as you did before."


class RegistrationClosed(PermissionDenied):
    default_code = "registration_closed"
    default_message = "Here operators make accounts. Ask one for yours."


class EmailNotConfigured(Conflict):
    default_code = "email_not_configured"
    default_message = "This installation sends no e-mail. Ask an operator."


class EmailBusy(Unavailable):
    default_code = "email_busy"
    default_message = "Too many messages wait to be sent. Retry later."


class InvalidEmailToken(InvalidRequest):
    """One answer for an unknown, used or expired token."""

    default_code = "invalid_email_token"
    default_message = "token: this is not valid any more; ask for a new message."


class MailNotSent(Unavailable):
    """The mail server did not take a message. Never reaches a client. `permanent`: trying again is no use."""

    default_code = "mail_not_sent"

    def __init__(self, *, detail: str, permanent: bool) -> None:
        super().__init__(detail=detail)
        self.permanent = permanent


class RedisDown(Unavailable):
    """Redis does not answer. Never reaches a client: what it missed is delivered later."""

    default_code = "redis_down"


class SigningKeyUnreadable(Internal):
    """At start only: the secret that sealed the signing key is not the one that was given."""

    default_code = "signing_key_unreadable"
    default_message = "TOLLGATE_AUTH_SECRET_KEY does not open the stored signing key; give the one that made it."
