//! Channels that could not be woken, and why.
//!
//! A push that Apple takes leaves no trace: only failures are rows, so a fleet that is well costs nothing. An event tells of a channel's
//! first failure and of each other reason, not of each attempt.

use crate::events::{Cause, Happened, emit};
use crate::memory::Change;
use crate::sql::{Columns, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError};
use serde_json::json;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushAttempt {
    /// Whom it was to wake.
    pub id: EnrollmentId,
    /// When the device had told the token that was pushed to. What is said of a token counts while it is the device's last.
    pub told_at: Timestamp,
    /// `None`: Apple took it.
    pub failure: Option<PushFailure>,
}

/// Why a push failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushFailure {
    /// One word: Apple's reason, or ours.
    pub code: String,
    /// A sentence for the operator, without secrets.
    pub detail: String,
    /// Whose fault it is: `device`, `certificate`, `service` or `server`.
    pub fault: &'static str,
    /// No push before the device's next TokenUpdate.
    pub token_is_dead: bool,
}

/// A channel's state, where its last push failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailingPush {
    /// Whose.
    pub id: EnrollmentId,
    /// One word.
    pub code: String,
    /// A sentence.
    pub detail: String,
    /// No push before the device's next TokenUpdate.
    pub token_is_dead: bool,
    /// Attempts that failed for that reason.
    pub failures: u32,
    /// Since when.
    pub first_at: Timestamp,
    /// The last attempt.
    pub last_at: Timestamp,
}

/// Attempts in one transaction.
const CHUNK: usize = 500;
/// The code of every reason that has none of its own: only the sentence tells them apart.
const UNKNOWN: &str = "unknown";

pub(crate) const SELECT_ALL: &str = "SELECT enrollment_id FROM push_failures";
// Of a device that is there and has told nothing since.
const SELECT_KNOWN: &str = "SELECT f.code, f.detail FROM enrollments e \
    LEFT JOIN enrollment_messages m ON m.enrollment_id = e.id AND m.message_type = 'TokenUpdate' \
    LEFT JOIN push_failures f ON f.enrollment_id = e.id \
    WHERE e.id = ? AND e.tenant_id = ? AND e.state = 'enrolled' AND COALESCE(m.received_at, e.enrolled_at, 0) = ?";
const SELECT_OF: &str =
    "SELECT enrollment_id, code, detail, token_is_dead, failures, first_at, last_at FROM push_failures WHERE enrollment_id = ? AND tenant_id = ?";
// A failure for another reason is another one.
const UPSERT: &str = "INSERT INTO push_failures (enrollment_id, tenant_id, code, detail, token_is_dead, failures, first_at, last_at) \
    VALUES (?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (enrollment_id) DO UPDATE SET \
    failures = CASE WHEN ? THEN push_failures.failures + 1 ELSE 1 END, \
    first_at = CASE WHEN ? THEN push_failures.first_at ELSE excluded.first_at END, \
    code = excluded.code, detail = excluded.detail, token_is_dead = excluded.token_is_dead, last_at = excluded.last_at";
const DELETE: &str = "DELETE FROM push_failures WHERE enrollment_id = ?";
pub(crate) const COUNT: &str = "SELECT code, COUNT(*) FROM push_failures GROUP BY code";

impl Storage {
    /// Keeps what became of pushes. Costs nothing for those that went well and did before.
    ///
    /// A device that has told another token meanwhile is left as it is: what came too late is about a token that it has left behind.
    pub async fn record_pushes(&self, tenant: &TenantId, attempts: Vec<PushAttempt>, now: Timestamp) -> Result<(), StorageError> {
        let memory = &self.inner.memory;
        let attempts: Arc<[PushAttempt]> =
            attempts.into_iter().filter(|attempt| attempt.failure.is_some() || memory.is_push_failing(&attempt.id)).collect();
        for attempt in attempts.iter().filter(|attempt| attempt.failure.is_some()) {
            memory.expect_push_failure(&attempt.id);
        }
        for start in (0..attempts.len()).step_by(CHUNK) {
            let (attempts, tenant) = (Arc::clone(&attempts), tenant.clone());
            let chunk = self.write(Class::Background, move |tx| {
                let (attempts, tenant) = (Arc::clone(&attempts), tenant.clone());
                Box::pin(async move {
                    for attempt in attempts.iter().skip(start).take(CHUNK) {
                        record(tx, &tenant, attempt, now).await?;
                    }
                    Ok(Outcome::Commit(()))
                })
            });
            chunk.await?;
        }
        Ok(())
    }

    /// Why the channel's last push failed, if it did. Costs nothing otherwise.
    pub async fn failing_push(&self, tenant: &TenantId, id: &EnrollmentId) -> Result<Option<FailingPush>, StorageError> {
        if !self.inner.memory.is_push_failing(id) {
            return Ok(None);
        }
        let Some(row) = self.look_up(SELECT_OF, args![id.as_str(), tenant.as_str()]).await? else { return Ok(None) };
        Ok(Some(FailingPush {
            id: EnrollmentId::new(row.text(0)?),
            code: row.text(1)?,
            detail: row.text(2)?,
            token_is_dead: row.flag(3)?,
            failures: row.count(4)?,
            first_at: row.time(5)?,
            last_at: row.time(6)?,
        }))
    }

    /// Channels whose last push failed, by reason: for the metric.
    pub async fn count_failing_pushes(&self) -> Result<Vec<(String, u32)>, StorageError> {
        self.read_all(COUNT, args![]).await?.iter().map(|row| Ok((row.text(0)?, row.count(1)?))).collect()
    }
}

async fn record(tx: &mut Tx, tenant: &TenantId, attempt: &PushAttempt, now: Timestamp) -> Result<(), StorageError> {
    let PushAttempt { id, told_at, failure } = attempt;
    let Some(row) = tx.one(SELECT_KNOWN, args![id.as_str(), tenant.as_str(), told_at.as_millis()]).await? else { return Ok(()) };
    let Some(failure) = failure else { return forget(tx, id).await };
    let (code, detail) = (row.opt_text(0)?, row.opt_text(1)?);
    let is_same = code.as_deref() == Some(&failure.code) && (failure.code != UNKNOWN || detail.as_deref() == Some(&failure.detail));
    failed(tx, tenant, id, failure, is_same, now).await
}

/// `is_same`: it failed for the same reason before.
async fn failed(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, failure: &PushFailure, is_same: bool, now: Timestamp) -> Result<(), StorageError> {
    let args = args![
        id.as_str(),
        tenant.as_str(),
        failure.code.as_str(),
        failure.detail.as_str(),
        i64::from(failure.token_is_dead),
        now.as_millis(),
        now.as_millis(),
        i64::from(is_same),
        i64::from(is_same),
    ];
    tx.run(UPSERT, args).await?;
    tx.after_commit(Change::PushFailing(id.clone(), true));
    if is_same {
        return Ok(());
    }
    let happened = Happened { tenant, topic: "push.failed", request_type: None, at: now, who: Some(id), cause: &Cause::default() };
    let PushFailure { code, detail, fault, token_is_dead } = failure;
    emit(tx, happened, || json!({ "push": { "code": code, "detail": detail, "fault": fault, "token_is_dead": token_is_dead } })).await
}

/// The channel was woken, or has a new token.
pub(crate) async fn forget(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    if tx.is_push_failing(id) {
        tx.run(DELETE, args![id.as_str()]).await?;
        tx.after_commit(Change::PushFailing(id.clone(), false));
    }
    Ok(())
}
