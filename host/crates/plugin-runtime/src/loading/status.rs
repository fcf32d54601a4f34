//! What an operator sees of plugins: `GET /api/v1/plugins` and the answers to a reload.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Value, json};
use wasmdm_protocol::time::Timestamp;

use crate::effective::{Capabilities, Effective, EnqueueGrant, Limits};

use super::candidate::Stage;

/// One plugin.
#[derive(Debug, Clone, Serialize)]
pub struct PluginStatus {
    pub name: String,
    pub state: State,
    /// Whether the server is not ready without it.
    pub required: bool,
    /// Of the active version, like the next ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Since when it is in this state.
    #[serde(serialize_with = "rfc3339")]
    pub since: Timestamp,
    /// Where the active version's bytes came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<i32>,
    pub hooks: Vec<&'static str>,
    /// The service types of its `token-source`.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub token_services: BTreeSet<String>,
    /// Failure policies of the hooks that a device waits for.
    pub on_failure: BTreeMap<&'static str, &'static str>,
    /// What it may do. Names of secrets, never their values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grants: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// A version that is being loaded, or that was not accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidate: Option<CandidateStatus>,
}

/// What a plugin is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Active,
    /// Being loaded for the first time.
    Pending,
    /// Nothing of it could be loaded.
    Rejected,
    /// It must be active and is not: its closed hooks refuse.
    RequiredMissing,
    /// By its grant file.
    Disabled,
}

/// Where the bytes of an active version came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The plugin directory.
    Directory,
    /// The data directory, after a restart.
    Kept,
}

/// A version beside the active one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CandidateStatus {
    pub state: CandidateState,
    /// The stage that it did not reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(serialize_with = "rfc3339")]
    pub since: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateState {
    Loading,
    Rejected,
}

/// What came of a reload of one plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReloadOutcome {
    pub name: String,
    pub result: ReloadResult,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of the version that is active now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReloadResult {
    Activated,
    Unchanged,
    Rejected,
    /// Its grant file says so.
    Disabled,
    /// It is not in the plugin directory.
    Absent,
}

impl ReloadResult {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Activated => "activated",
            Self::Unchanged => "unchanged",
            Self::Rejected => "rejected",
            Self::Disabled => "disabled",
            Self::Absent => "absent",
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn rfc3339<S: serde::Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

/// Capabilities for a person, in the words of the grant file.
pub(super) fn grants_of(effective: &Effective) -> Value {
    let Capabilities { kv, http, enrollments, commands, push, timers } = &effective.settings.capabilities;
    let mut grants = serde_json::Map::new();
    if let Some(kv) = kv {
        grants.insert("kv".to_owned(), json!({ "bytes": kv.bytes, "keys": kv.keys }));
    }
    if let Some(http) = http {
        let origins = http.policy.allowed.iter().map(|origin| format!("{}://{}:{}", origin.scheme, origin.host, origin.port));
        grants.insert("http".to_owned(), origins.collect());
        grants.insert("http-sync".to_owned(), json!(http.sync_hooks));
        grants.insert("secrets".to_owned(), http.policy.secrets.keys().cloned().collect());
    }
    let rights = [("read", enrollments.read), ("tag", enrollments.tag), ("release", enrollments.release)];
    let rights: Vec<_> = rights.into_iter().filter(|(_, granted)| *granted).map(|(right, _)| right).collect();
    if !rights.is_empty() {
        grants.insert("enrollments".to_owned(), json!(rights));
    }
    let mut rights: Vec<String> = match &commands.enqueue {
        EnqueueGrant::All => vec!["enqueue:*".to_owned()],
        EnqueueGrant::Types(types) => types.iter().map(|request_type| format!("enqueue:{request_type}")).collect(),
    };
    rights.extend(commands.read.then(|| "read".to_owned()));
    rights.extend(commands.cancel.then(|| "cancel".to_owned()));
    if !rights.is_empty() {
        grants.insert("commands".to_owned(), json!(rights));
    }
    if *push {
        grants.insert("push".to_owned(), json!(true));
    }
    if *timers {
        grants.insert("timers".to_owned(), json!(true));
    }
    Value::Object(grants)
}

/// Limits in bytes and milliseconds.
pub(super) fn limits_of(limits: &Limits) -> Value {
    let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    json!({
        "memory": limits.memory,
        "cpu_ms": millis(limits.cpu_sync),
        "cpu_async_ms": millis(limits.cpu_async),
        "decision_ms": millis(limits.wall.decision),
        "answer_ms": millis(limits.wall.answer),
        "event_ms": millis(limits.wall.event),
        "schedule_ms": millis(limits.wall.schedule),
        "lifecycle_ms": millis(limits.wall.lifecycle),
        "host_calls": limits.host_calls,
        "input": limits.input,
        "output": limits.output,
        "commands": limits.commands,
        "timers": limits.timers,
        "http_calls": limits.http_calls,
        "http_timeout_ms": millis(limits.http_timeout),
        "concurrent": limits.concurrent,
        "waiting": limits.waiting,
    })
}
