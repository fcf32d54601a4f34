//! What a plugin's call leaves behind: buffered while it runs, committed with the decision or the acknowledgement.
use crate::commands::CommandOptions;
use bytes::Bytes;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// A write that depended on values which may have changed meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied<T> {
    Done(T),
    /// Something that a plugin read has changed; nothing was written. The text says what.
    Conflict(String),
}

/// All effects of one call of one plugin.
#[derive(Debug, Clone)]
pub struct PluginEffects {
    pub tenant: TenantId,
    /// The plugin's name with its scope: `NAME` for a shared one, `TENANT/NAME` for a tenant's own.
    pub plugin: String,
    /// Re-checked at commit: the key and the version that was read (`None`: it was absent). One entry per key: the first read.
    pub reads: Vec<(String, Option<String>)>,
    pub writes: Vec<KvWrite>,
    pub quota: KvQuota,
    /// In order. All of one call or none.
    pub commands: Vec<PluginCommand>,
    /// Commands to cancel; each was cancellable when the plugin asked (re-checked).
    pub cancels: Vec<(EnrollmentId, String)>,
    pub tags: Vec<TagChange>,
    /// Enrollments whose quarantine ends; each was quarantined when the plugin asked (re-checked).
    pub releases: Vec<EnrollmentId>,
    pub timers: Vec<TimerChange>,
}

#[derive(Debug, Clone)]
pub struct KvWrite {
    pub key: String,
    /// `None` removes.
    pub value: Option<Bytes>,
    /// The version that the write gives the key: chosen by the host, random.
    pub version: String,
    pub expires_at: Option<Timestamp>,
}

/// Checked at commit over the plugin's whole name space of the tenant.
#[derive(Debug, Clone, Copy)]
pub struct KvQuota {
    pub bytes: u64,
    pub keys: u64,
}

#[derive(Debug, Clone)]
pub struct PluginCommand {
    pub target: EnrollmentId,
    pub command: Command,
    pub options: CommandOptions,
}

#[derive(Debug, Clone)]
pub struct TagChange {
    pub id: EnrollmentId,
    pub add: Vec<String>,
    pub remove: Vec<String>,
}

#[derive(Debug, Clone)]
pub enum TimerChange {
    Set {
        name: String,
        who: Option<EnrollmentId>,
        at: Timestamp,
        data: Bytes,
    },
    /// `existed` is what the plugin was told (re-checked). Also withdraws a fired tick that is still waiting.
    Cancel {
        name: String,
        who: Option<EnrollmentId>,
        existed: bool,
    },
}
