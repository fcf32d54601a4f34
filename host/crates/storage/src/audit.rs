//! Who decided what.

use crate::effects::{self, Applied, DecisionEffects};
use crate::sql::{Columns, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, sealed, tenant};
use std::fmt::Display;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// One row of the audit.
#[derive(Debug, Clone)]
pub struct AuditRow {
    /// Whose.
    pub tenant: TenantId,
    /// `plugin:NAME`, `api:SUBJECT`, `server`.
    pub actor: String,
    /// For instance `enrollment-policy.deny`.
    pub action: String,
    /// The enrollment it is about; it need not exist.
    pub target: Option<EnrollmentId>,
    /// JSON; holds reason, digest, generation.
    pub detail: serde_json::Value,
    /// When.
    pub at: Timestamp,
}

const INSERT: &str = "INSERT INTO audit (tenant_id, actor, action, target, detail, at) VALUES (?, ?, ?, ?, ?, ?)";
const SELECT: &str = "SELECT tenant_id, actor, action, target, detail, at FROM audit WHERE tenant_id = ? ORDER BY sequence DESC LIMIT ?";

impl Storage {
    /// What a decision that changed no enrollment leaves behind: its plugins' key-values, and audit rows. Rate limits are the caller's.
    /// `Conflict` when a value that a plugin read has changed: nothing is written.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when an effect can never be stored.
    pub async fn record_decision(&self, effects: Vec<DecisionEffects>, audit: Vec<AuditRow>, now: Timestamp) -> Result<Applied<()>, StorageError> {
        let decision = Arc::new((effects, audit));
        self.write(Class::Answer, move |tx| {
            let decision = Arc::clone(&decision);
            Box::pin(async move {
                let (effects, audit) = &*decision;
                let sound = match effects::check_decision(tx, effects, now).await? {
                    Applied::Done(sound) => sound,
                    Applied::Conflict(what) => return Ok(Outcome::Commit(Applied::Conflict(what))),
                };
                for plugin in sound {
                    effects::apply(tx, plugin, &effects::cause_of(plugin, 0), None, now).await?;
                }
                for row in audit {
                    insert(tx, row).await?;
                }
                Ok(Outcome::Commit(Applied::Done(())))
            })
        })
        .await
    }

    /// Newest first.
    pub async fn audit(&self, of: &TenantId, limit: u32) -> Result<Vec<AuditRow>, StorageError> {
        let rows = self.read_all(SELECT, args![of.as_str(), i64::from(limit)]).await?;
        rows.iter()
            .map(|row| {
                let (tenant, actor, action, target) = (tenant(row, 0)?, row.text(1)?, row.text(2)?, row.opt_text(3)?);
                let place: [&(dyn Display + Sync); 4] = [&actor, &action, &target.as_deref().unwrap_or_default(), &row.int(5)?];
                let detail = self.keyring().at(&sealed::AUDIT_DETAIL, &tenant, &place).open_json(row.blob(4)?)?;
                Ok(AuditRow { tenant, actor, action, target: target.map(EnrollmentId::new), detail, at: row.time(5)? })
            })
            .collect()
    }
}

pub(crate) async fn insert(tx: &mut Tx, row: &AuditRow) -> Result<(), StorageError> {
    let target = row.target.as_ref().map_or("", EnrollmentId::as_str);
    let place: [&(dyn Display + Sync); 4] = [&row.actor, &row.action, &target, &row.at.as_millis()];
    let detail = tx.keyring.at(&sealed::AUDIT_DETAIL, &row.tenant, &place).seal(row.detail.to_string().as_bytes())?;
    tx.run(
        INSERT,
        args![
            row.tenant.as_str(),
            row.actor.as_str(),
            row.action.as_str(),
            row.target.as_ref().map(EnrollmentId::as_str),
            detail,
            row.at.as_millis(),
        ],
    )
    .await?;
    Ok(())
}
