//! Whoever authenticates users of Macs (`UserAuthenticate`).

use std::fmt;

use futures_util::future::BoxFuture;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::plist;

use crate::asker::Asker;
use crate::owned_answer::OwnedAnswer;
use crate::reply::Refusal;

/// The plugin with the hook `user-authentication`.
pub trait UserAuthentication: fmt::Debug + Send + Sync + 'static {
    /// Asks the owner about a user. An error is the database's.
    fn authenticate<'a>(&'a self, login: &'a Login) -> BoxFuture<'a, Result<OwnedAnswer<UserVerdict>, Refusal>>;

    /// Whether there is an owner for the tenant, or should be: what it has said of users counts.
    fn is_there(&self, tenant: &TenantId) -> bool;
}

/// A user who logs in.
#[derive(Clone)]
pub struct Login {
    /// The user's channel, which need not exist yet.
    pub asker: Asker,
    /// The whole message. Holds the digest.
    pub message: plist::Value,
    /// The answer to a challenge; without one this is the first message. A secret.
    pub digest_response: Option<String>,
}

/// Without message and digest.
impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("asker", &self.asker).field("digest_response", &self.digest_response.is_some()).finish_non_exhaustive()
    }
}

/// What the owner says of a user.
#[derive(Clone, PartialEq, Eq)]
pub enum UserVerdict {
    /// No opinion: as if nobody had been asked.
    Abstain,
    /// Not to be managed.
    Decline,
    /// Managed without a proof.
    NoChallenge,
    /// The user is to prove who they are.
    Challenge(String),
    /// The digest is right. A secret, with which the user's channel goes on.
    AuthToken(String),
    /// The digest is wrong.
    Reject,
}

impl UserVerdict {
    /// The verdict's name in the contract.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Abstain => "abstain",
            Self::Decline => "decline",
            Self::NoChallenge => "no-challenge",
            Self::Challenge(_) => "challenge",
            Self::AuthToken(_) => "auth-token",
            Self::Reject => "reject",
        }
    }
}

/// Without challenge and token.
impl fmt::Debug for UserVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
