//! What a device may be answered.
//!
//! There is no case for the two answers that make a device remove its management (401, and 403 with
//! `com.apple.unrecognized.device`): they cannot be given by accident.

use std::time::Duration;

use bytes::Bytes;
use wasmdm_storage::StorageError;

/// A good answer: status 200, but for [`Reply::NoContent`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Nothing to say: a body of zero length.
    Empty,
    /// An XML property list.
    Plist(Bytes),
    /// JSON of declarative management.
    Json(Bytes),
    /// 204, of declarative management only.
    NoContent,
    /// The next command, to the byte as it was queued.
    Command {
        /// For the log.
        uuid: String,
        /// The whole document.
        body: Bytes,
    },
}

/// A refusal. The reasons are for the log and the operator; of a deny the device learns the reason too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// 400: what was sent is wrong, or is not this device's to send.
    #[error("{reason}")]
    BadRequest {
        /// Names the key or the rule.
        reason: String,
    },
    /// 403 `text/plain`: a policy says no.
    #[error("denied: {reason}")]
    Denied {
        /// The policy's own words.
        reason: String,
    },
    /// 404: nothing is there (declarative management that nobody serves).
    #[error("{reason}")]
    NotFound {
        /// What was asked for.
        reason: String,
    },
    /// 410: this user is not to be managed (`UserAuthenticate`).
    #[error("declined")]
    Declined,
    /// 503 with Retry-After: try again.
    #[error("{reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
        /// For the `Retry-After` header.
        retry_after: Duration,
    },
}

/// How long a device is asked to wait when something is unavailable.
pub const RETRY_AFTER: Duration = Duration::from_secs(30);

impl Refusal {
    /// A 400 for that reason.
    pub fn bad_request(reason: impl Into<String>) -> Self {
        Self::BadRequest { reason: reason.into() }
    }

    /// A 503 for that reason.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable { reason: reason.into(), retry_after: RETRY_AFTER }
    }
}

/// Whatever is wrong with the database, the device keeps its enrollment and comes again.
impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Self {
        match error {
            // What a plugin wrote cannot be stored, for instance because it is over its quota: that is not the device's fault.
            StorageError::Invalid { field: "effects", .. } => Self::unavailable(error.to_string()),
            StorageError::Invalid { .. } => Self::bad_request(error.to_string()),
            _ => Self::unavailable(error.to_string()),
        }
    }
}
