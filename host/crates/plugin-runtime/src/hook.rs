//! The hooks that this server calls, one exported interface each.

use std::collections::BTreeSet;
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
    UserAuthentication,
    TokenSource,
    ReturnToService,
    EventCommands,
    EventSink,
    Schedule,
}

impl Hook {
    /// All hooks.
    pub const ALL: [Self; 8] = [
        Self::Lifecycle,
        Self::EnrollmentPolicy,
        Self::UserAuthentication,
        Self::TokenSource,
        Self::ReturnToService,
        Self::EventCommands,
        Self::EventSink,
        Self::Schedule,
    ];

    /// The interface's name, as in manifests, metrics and the outbox.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::EnrollmentPolicy => "enrollment-policy",
            Self::UserAuthentication => "user-authentication",
            Self::TokenSource => "token-source",
            Self::ReturnToService => "return-to-service",
            Self::EventCommands => "event-commands",
            Self::EventSink => "event-sink",
            Self::Schedule => "schedule",
        }
    }

    /// Those of which one that cannot be asked refuses.
    pub fn guards() -> BTreeSet<Self> {
        Self::ALL.into_iter().filter(|hook| hook.default_on_failure() == OnFailure::Closed).collect()
    }

    /// The hook of that name, if this server calls it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.as_str() == name)
    }

    /// Whether a device waits for the answer.
    pub const fn is_sync(self) -> bool {
        self.is_decision() || self.is_answer()
    }

    /// Whether it is the answer to a check-in, which one plugin of a tenant gives. It always counts, and always fails closed.
    pub const fn is_answer(self) -> bool {
        matches!(self, Self::UserAuthentication | Self::TokenSource | Self::ReturnToService)
    }

    /// Whether it decides about a request, so that it has a failure policy and can be monitored.
    pub const fn is_decision(self) -> bool {
        matches!(self, Self::EnrollmentPolicy)
    }

    /// What a failure means where the operator does not say. Of no meaning for hooks that decide nothing: those are retried.
    pub const fn default_on_failure(self) -> OnFailure {
        match self {
            Self::EnrollmentPolicy | Self::UserAuthentication | Self::TokenSource | Self::ReturnToService => OnFailure::Closed,
            _ => OnFailure::Open,
        }
    }

    /// What a call of this hook may do through imports, at most; grants narrow it further.
    pub(crate) const fn permissions(self) -> Permissions {
        match self {
            // Nothing of a `lifecycle` is committed, and of `event-commands` only the commands that it returns.
            Self::Lifecycle | Self::EventCommands => Permissions { kv_write: false, write: false, http: Http::Never },
            Self::EnrollmentPolicy | Self::UserAuthentication | Self::TokenSource | Self::ReturnToService => {
                Permissions { kv_write: true, write: false, http: Http::IfSync }
            }
            Self::EventSink | Self::Schedule => Permissions { kv_write: true, write: true, http: Http::Granted },
        }
    }
}

/// What only one plugin of a tenant can have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owned {
    UserAuthentication,
    ReturnToService,
    /// A service type of `token-source`.
    Token(String),
}

impl Owned {
    /// All that a plugin with these hooks has.
    pub(crate) fn all(hooks: &BTreeSet<Hook>, token_services: &BTreeSet<String>) -> Vec<Self> {
        let mut all = Vec::new();
        if hooks.contains(&Hook::UserAuthentication) {
            all.push(Self::UserAuthentication);
        }
        if hooks.contains(&Hook::ReturnToService) {
            all.push(Self::ReturnToService);
        }
        if hooks.contains(&Hook::TokenSource) {
            all.extend(token_services.iter().cloned().map(Self::Token));
        }
        all
    }

    /// The hook that is called for it.
    pub const fn hook(&self) -> Hook {
        match self {
            Self::UserAuthentication => Hook::UserAuthentication,
            Self::ReturnToService => Hook::ReturnToService,
            Self::Token(_) => Hook::TokenSource,
        }
    }
}

impl fmt::Display for Owned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UserAuthentication | Self::ReturnToService => write!(f, "the hook `{}`", self.hook()),
            Self::Token(service) => write!(f, "tokens for `{}`", service.escape_default()),
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
