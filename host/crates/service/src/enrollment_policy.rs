//! The decision whether a device may enroll, asked before anything of its Authenticate is stored.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, TenantId};
use wasmdm_protocol::plist;
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::effects::DecisionEffects;

/// Whoever may refuse an enrollment: the plugins with the hook `enrollment-policy`.
pub trait EnrollmentPolicy: std::fmt::Debug + Send + Sync + 'static {
    /// Decides about a candidate whose certificate was verified. Never fails: what goes wrong inside is a [`Verdict`].
    fn decide<'a>(&'a self, candidate: &'a Candidate) -> BoxFuture<'a, PolicyAnswer>;
}

/// A device that asks to enroll.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub tenant: TenantId,
    pub enrollment: Enrollment,
    pub topic: String,
    pub facts: DeviceFacts,
    pub certificate: Certificate,
    pub url_params: BTreeMap<String, String>,
    /// The Authenticate message.
    pub message: plist::Value,
    /// Whether the enrollment is known already.
    pub re_enrolling: bool,
    /// A command has asked for it: its identity is renewed, and it goes on as it was.
    pub renewing: bool,
    /// Of the device's request: the same in log and audit.
    pub request_id: String,
}

/// What all plugins together say.
#[derive(Debug, Clone)]
pub struct PolicyAnswer {
    pub verdict: Verdict,
    /// JSON array of `{plugin, digest, generation, verdict, reason?}`, in the order asked.
    pub decisions: serde_json::Value,
    /// What the plugins wrote; commits with the decision, a deny too.
    pub effects: Vec<DecisionEffects>,
    /// One row per deny, quarantine and failure; already rate-limited.
    pub audit: Vec<AuditRow>,
}

impl PolicyAnswer {
    /// Whether a plugin said `allow` (and not only that it does not mind), and is not merely monitored.
    pub fn is_allowed_by_name(&self) -> bool {
        let said = |decision: &serde_json::Value, key: &str| decision.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
        let decisions = self.decisions.as_array();
        decisions.into_iter().flatten().any(|decision| said(decision, "verdict").as_deref() == Some("allow") && said(decision, "mode").is_none())
    }
}

/// The one outcome of a chain of decisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All abstained or allowed.
    Allow {
        /// To set once the enrollment is stored.
        tags: Vec<String>,
    },
    /// Stored and enabled, but only commands of a person or of that plugin are delivered.
    Quarantine { by: String, tags: Vec<String> },
    /// Refused: 403.
    Deny {
        /// For the device's answer and the log.
        reason: String,
    },
    /// A closed hook could not decide: 503, nothing is stored.
    Unavailable { reason: String },
}
