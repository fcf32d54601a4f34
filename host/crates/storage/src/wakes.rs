//! When channels with waiting commands are woken by a push.
//!
//! One row per channel, whatever asks for the push, so that a device is told once. A row is written with the command that it is for, so a
//! push that somebody was promised is made after a restart too; it goes when the queue is empty.
//!
//! The device does not keep a command that it answered `NotNow`, and comes again by itself only if that was the last word of its session
//! (edge case 36). Otherwise it is woken after a minute, then after two, up to every six hours. One that does not come at all although
//! it was woken is woken again the same way, but from a quarter of an hour on: Apple keeps the push for it.

use crate::memory::Change;
use crate::sql::{Columns, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError};
use std::sync::Arc;
use std::time::Duration;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// The first time between two pushes; each is twice the one before.
const FIRST: Duration = Duration::from_mins(1);
/// No longer than this.
const LONGEST: Duration = Duration::from_hours(6);
/// Doublings until [`LONGEST`].
const STEPS: i64 = 9;
/// The step of a device that was woken and owes a visit: about a quarter of an hour.
const OWES_A_VISIT: i64 = 4;
/// Whoever has queued a command wakes its device right after the commit. If the server dies in between, this is when it is done instead.
const PROMISED: Duration = Duration::from_secs(30);
/// Whoever has taken a wake has so long for the push.
const LEASE: Duration = Duration::from_mins(2);

/// A channel that is to be woken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    /// Whose it is.
    pub tenant: TenantId,
    /// A device's channel, or a user's.
    pub enrollment: EnrollmentId,
}

impl Storage {
    /// Takes channels whose time has come, the longest due first. Whoever takes one wakes it and says so to [`Self::woken`]; otherwise it is
    /// taken again after two minutes.
    pub async fn take_due_wakes(&self, limit: u32, now: Timestamp) -> Result<Vec<Wake>, StorageError> {
        if self.read_one(SELECT_DUE, args![now.as_millis(), 1_i64]).await?.is_none() {
            return Ok(Vec::new());
        }
        self.write(Class::Background, move |tx| {
            Box::pin(async move {
                let mut taken = Vec::new();
                for row in tx.all(SELECT_DUE, args![now.as_millis(), i64::from(limit)]).await? {
                    let wake = Wake { tenant: TenantId::new(row.text(0)?), enrollment: EnrollmentId::new(row.text(1)?) };
                    if tx.one(IS_WAITED_FOR, args![wake.enrollment.as_str()]).await?.is_some() {
                        tx.run(SET_DUE, args![now.plus(LEASE).as_millis(), now.as_millis(), wake.enrollment.as_str()]).await?;
                        taken.push(wake);
                    } else {
                        remove(tx, &wake.enrollment).await?;
                    }
                }
                Ok(Outcome::Commit(taken))
            })
        })
        .await
    }

    /// The channels were woken, or could not be: the next time is reckoned from now.
    pub async fn woken(&self, ids: Vec<EnrollmentId>, now: Timestamp) -> Result<(), StorageError> {
        let ids: Arc<[EnrollmentId]> = ids.into_iter().filter(|id| self.inner.memory.has_wake(id)).collect();
        for start in (0..ids.len()).step_by(CHUNK) {
            let ids = Arc::clone(&ids);
            let chunk = self.write(Class::Background, move |tx| {
                let ids = Arc::clone(&ids);
                Box::pin(async move {
                    for id in ids.iter().skip(start).take(CHUNK) {
                        if let Some(step) = step(tx, id).await? {
                            postpone(tx, id, step.max(OWES_A_VISIT), now).await?;
                        }
                    }
                    Ok(Outcome::Commit(()))
                })
            });
            chunk.await?;
        }
        Ok(())
    }

    /// When a channel is to be woken, if it is.
    pub async fn next_wake(&self, id: &EnrollmentId) -> Result<Option<Timestamp>, StorageError> {
        self.read_one(SELECT_OF, args![id.as_str()]).await?.map_or(Ok(None), |row| row.opt_time(0))
    }
}

/// Channels in one transaction.
const CHUNK: usize = 500;

pub(crate) const SELECT_ALL: &str = "SELECT enrollment_id FROM wakes";
pub(crate) const SELECT_DUE: &str = "SELECT tenant_id, enrollment_id FROM wakes WHERE due_at <= ? ORDER BY due_at LIMIT ?";
const SELECT_OF: &str = "SELECT due_at, step FROM wakes WHERE enrollment_id = ?";
// Somebody who left, or whose queue is empty, is not woken.
const IS_WAITED_FOR: &str = "SELECT 1 FROM enrollments e WHERE e.id = ? AND e.state = 'enrolled' \
    AND EXISTS (SELECT 1 FROM command_queue q WHERE q.enrollment_id = e.id AND q.is_open = 1)";
const SET_DUE: &str = "UPDATE wakes SET due_at = ?, updated_at = ? WHERE enrollment_id = ?";
const POSTPONE: &str = "UPDATE wakes SET due_at = ?, step = ?, updated_at = ? WHERE enrollment_id = ?";
const INSERT: &str = "INSERT INTO wakes (enrollment_id, tenant_id, due_at, step, updated_at) VALUES (?, ?, ?, 0, ?) \
    ON CONFLICT (enrollment_id) DO UPDATE SET updated_at = excluded.updated_at, \
    due_at = CASE WHEN wakes.due_at < excluded.due_at THEN wakes.due_at ELSE excluded.due_at END";
const DELETE: &str = "DELETE FROM wakes WHERE enrollment_id = ?";
const SELECT_OF_DEVICE: &str = "SELECT w.enrollment_id FROM wakes w JOIN enrollments e ON e.id = w.enrollment_id WHERE e.id = ? OR e.parent_id = ?";

/// How long after a push of that step the next one is due.
fn interval(step: i64) -> Duration {
    let doublings = u32::try_from(step.clamp(0, STEPS)).unwrap_or_default();
    FIRST.saturating_mul(2_u32.saturating_pow(doublings)).min(LONGEST)
}

/// A command was queued whose device is to be woken, at once or when it may go out.
pub(crate) async fn command_waits(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    not_before: Option<Timestamp>,
    now: Timestamp,
) -> Result<(), StorageError> {
    let due = not_before.filter(|at| *at > now).unwrap_or_else(|| now.plus(PROMISED));
    insert(tx, tenant, id, due, now).await
}

/// A session is over, and deferred commands remain. `comes_again` says that its last word was `NotNow`: the device comes by itself, and is
/// waited for as one that owes a visit.
pub(crate) async fn session_ended(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, comes_again: bool, now: Timestamp) -> Result<(), StorageError> {
    let known = step(tx, id).await?;
    if known.is_none() {
        insert(tx, tenant, id, now.plus(PROMISED), now).await?;
    }
    let step = known.unwrap_or(0);
    postpone(tx, id, if comes_again { step.max(OWES_A_VISIT) } else { step }, now).await
}

/// The queue of the channel is empty.
pub(crate) async fn not_needed(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    // A row that was written in the same group is not known yet: it is found empty when it is due.
    if tx.memory.has_wake(id) {
        remove(tx, id).await?;
    }
    Ok(())
}

/// Nothing that waited for the device or its users goes out any more.
pub(crate) async fn device_begins_anew(tx: &mut Tx, device: &EnrollmentId) -> Result<(), StorageError> {
    for row in tx.all(SELECT_OF_DEVICE, args![device.as_str(), device.as_str()]).await? {
        remove(tx, &EnrollmentId::new(row.text(0)?)).await?;
    }
    Ok(())
}

async fn insert(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, due: Timestamp, now: Timestamp) -> Result<(), StorageError> {
    tx.run(INSERT, args![id.as_str(), tenant.as_str(), due.as_millis(), now.as_millis()]).await?;
    tx.after_commit(Change::Wake(id.clone(), true));
    Ok(())
}

async fn remove(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    tx.run(DELETE, args![id.as_str()]).await?;
    tx.after_commit(Change::Wake(id.clone(), false));
    Ok(())
}

async fn step(tx: &mut Tx, id: &EnrollmentId) -> Result<Option<i64>, StorageError> {
    tx.one(SELECT_OF, args![id.as_str()]).await?.map(|row| row.int(1)).transpose()
}

async fn postpone(tx: &mut Tx, id: &EnrollmentId, step: i64, now: Timestamp) -> Result<(), StorageError> {
    let next = (step + 1).min(STEPS);
    tx.run(POSTPONE, args![now.plus(interval(step)).as_millis(), next, now.as_millis(), id.as_str()]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_between_two_pushes_doubles_from_a_minute_to_six_hours() {
        let minutes: Vec<u64> = (0..12).map(|step| interval(step).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]);
        assert_eq!(interval(OWES_A_VISIT), Duration::from_mins(16));
    }
}
