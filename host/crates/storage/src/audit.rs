use crate::effects::PluginEffects;
use crate::{Storage, StorageError};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// One row of the audit.
#[derive(Debug, Clone)]
pub struct AuditRow {
    pub tenant: TenantId,
    /// `plugin:NAME`, `api:SUBJECT`, `server`.
    pub actor: String,
    /// For instance `enrollment-policy.deny`.
    pub action: String,
    /// The enrollment it is about; it need not exist.
    pub target: Option<EnrollmentId>,
    /// JSON; holds reason, digest, generation.
    pub detail: serde_json::Value,
    pub at: Timestamp,
}

impl Storage {
    /// What a decision that changed no enrollment leaves behind: its plugins' key-values, and audit rows. Rate limits are the caller's.
    /// `Conflict` when a value that a plugin read has changed: nothing is written.
    pub async fn record_decision(
        &self,
        _effects: Vec<PluginEffects>,
        _audit: Vec<AuditRow>,
        _now: Timestamp,
    ) -> Result<crate::effects::Applied<()>, StorageError> {
        todo!()
    }
    /// Newest first.
    pub async fn audit(
        &self,
        _tenant: &TenantId,
        _limit: u32,
    ) -> Result<Vec<AuditRow>, StorageError> {
        todo!()
    }
}
