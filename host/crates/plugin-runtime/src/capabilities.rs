//! The imports: what a guest may ask the host for. Each checks its grant first, and every write waits in a buffer for the end of the call.

pub(crate) mod buffer;
pub(crate) mod log;
pub(crate) mod wasi;

mod commands;
mod config;
mod crypto;
mod enrollments;
mod http;
mod kv;
mod plist;
mod push;
mod runtime;
mod timers;

use wasmdm_storage::{Storage, StorageError};

use crate::bindings::wasmdm::plugin::types as wit;
use crate::call::State;
use crate::hook::Hook;

/// A host call that failed the guest, not the host.
pub(crate) type Denied = wit::Failure;

impl wit::Host for State {}

pub(crate) fn failure(code: &str, message: impl Into<String>) -> wit::Failure {
    wit::Failure { code: code.to_owned(), message: message.into(), retryable: false, retry_after_ms: None, detail: None }
}

pub(crate) fn invalid(message: impl Into<String>) -> wit::Failure {
    failure("invalid", message)
}

pub(crate) fn quota(message: impl Into<String>) -> wit::Failure {
    failure("quota", message)
}

/// Not granted: names the line of the grant file that would change it.
pub(crate) fn not_granted(what: &str) -> wit::Failure {
    failure("denied", format!("{what} is not granted to this plugin"))
}

/// Never granted in this hook.
pub(crate) fn not_here(what: &str, hook: Hook) -> wit::Failure {
    failure("denied", format!("{what} is not possible in {hook}"))
}

pub(crate) fn unavailable(error: &StorageError) -> wit::Failure {
    if let StorageError::Invalid { .. } = error {
        return invalid(error.to_string());
    }
    // What the database said is for the operator.
    tracing::warn!("A plugin's host call failed: {error}");
    wit::Failure { retryable: true, ..failure("unavailable", "the server's database is unavailable") }
}

impl State {
    pub(crate) fn storage(&self) -> Result<Storage, wit::Failure> {
        self.shared.services.storage.clone().ok_or_else(|| failure("unavailable", "there is no database here"))
    }

    /// Whether the hook may change anything but key-values.
    pub(crate) fn may_write(&self, what: &str) -> Result<(), wit::Failure> {
        if self.permissions.write { Ok(()) } else { Err(not_here(what, self.hook)) }
    }
}
