//! Whoever makes tokens for services (`GetToken`).

use std::fmt;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use wasmdm_protocol::plist;

use crate::asker::Asker;
use crate::owned_answer::OwnedAnswer;
use crate::reply::Refusal;

/// The plugins with the hook `token-source`.
pub trait TokenSource: fmt::Debug + Send + Sync + 'static {
    /// Asks the owner of the service type for a token; `None`: there is none for this enrollment. An error is the database's.
    fn token<'a>(&'a self, asked: &'a TokenRequest) -> BoxFuture<'a, Result<OwnedAnswer<Option<ServiceToken>>, Refusal>>;
}

/// What a device asks for.
#[derive(Clone)]
pub struct TokenRequest {
    pub asker: Asker,
    pub service_type: String,
    /// `TokenParameters`. Holds secrets.
    pub parameters: Option<plist::Value>,
}

/// Without the parameters.
impl fmt::Debug for TokenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRequest").field("asker", &self.asker).field("service_type", &self.service_type).finish_non_exhaustive()
    }
}

/// A token: a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceToken(Bytes);

impl ServiceToken {
    /// The longest that is handed on.
    pub const MAX: usize = 64 << 10;

    /// Why it cannot be a token, if it cannot.
    pub fn new(token: Bytes) -> Result<Self, &'static str> {
        match token.len() {
            0 => Err("the token is empty"),
            length if length > Self::MAX => Err("the token is longer than 64 KiB"),
            _ => Ok(Self(token)),
        }
    }

    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for ServiceToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServiceToken(…)")
    }
}
