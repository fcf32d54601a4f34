//! The hooks that this server calls, one exported interface each.

use std::fmt;

use crate::effective::OnFailure;

/// The package of the contract.
pub const PACKAGE: &str = "wasmdm:plugin";

/// The version of the contract that this server speaks.
pub const CONTRACT_VERSION: &str = "0.1.0";

/// An interface of the contract that a plugin may export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    Lifecycle,
    EnrollmentPolicy,
    EventCommands,
    EventSink,
    Schedule,
}

impl Hook {
    /// All hooks.
    pub const ALL: [Self; 5] = [Self::Lifecycle, Self::EnrollmentPolicy, Self::EventCommands, Self::EventSink, Self::Schedule];

    /// The interface's name, as in manifests, metrics and the outbox.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::EnrollmentPolicy => "enrollment-policy",
            Self::EventCommands => "event-commands",
            Self::EventSink => "event-sink",
            Self::Schedule => "schedule",
        }
    }

    /// The hook of that name, if this server calls it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.as_str() == name)
    }

    /// Whether a device waits for the answer.
    pub const fn is_sync(self) -> bool {
        matches!(self, Self::EnrollmentPolicy)
    }

    /// Whether it decides about a request, so that it has a failure policy and can be monitored.
    pub const fn is_decision(self) -> bool {
        matches!(self, Self::EnrollmentPolicy)
    }

    /// What a failure means where the operator does not say. Of no meaning for hooks that decide nothing: those are retried.
    pub const fn default_on_failure(self) -> OnFailure {
        match self {
            Self::EnrollmentPolicy => OnFailure::Closed,
            _ => OnFailure::Open,
        }
    }

    /// What a call of this hook may do through imports, at most; grants narrow it further.
    pub(crate) const fn permissions(self) -> Permissions {
        match self {
            // Nothing of a `lifecycle` is committed, and of `event-commands` only the commands that it returns.
            Self::Lifecycle | Self::EventCommands => Permissions { kv_write: false, write: false, http: Http::Never },
            Self::EnrollmentPolicy => Permissions { kv_write: true, write: false, http: Http::IfSync },
            Self::EventSink | Self::Schedule => Permissions { kv_write: true, write: true, http: Http::Granted },
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a hook may do at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permissions {
    pub(crate) kv_write: bool,
    /// Commands, tags, releases, timers.
    pub(crate) write: bool,
    pub(crate) http: Http,
}

/// Whether a hook may send requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Http {
    Never,
    /// Only with the grant `http-sync`.
    IfSync,
    Granted,
}
