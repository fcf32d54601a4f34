//! When channels with waiting commands are woken by a push.
//!
//! One row per channel, whatever asks for the push, so that a device is told once. A row is written with the command that it is for, so a
//! push that somebody was promised is made after a restart too; it goes when the queue is empty. A row that was asked for (a mass push, a
//! plugin) is good for one push even if no command waits.
//!
//! The device does not keep a command that it answered `NotNow`, and comes again by itself only if that was the last word of its session
//! (edge case 36). Otherwise it is woken after a minute, then after two, up to every six hours. One that does not come at all although
//! it was woken is woken again the same way, but from a quarter of an hour on: Apple keeps the push for it.

use crate::mass_pushes::{self, NOT_ENROLLED, TargetState};
use crate::memory::{Change, WakeState};
use crate::sql::{Columns, Db, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
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
/// A push that was asked for without a command is given up after so many attempts, a quarter of an hour.
const ATTEMPTS: i64 = 5;

/// A channel that is to be woken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    /// Whose it is.
    pub tenant: TenantId,
    /// A device's channel, or a user's.
    pub enrollment: EnrollmentId,
}

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Woken {
    /// Whose.
    pub enrollment: EnrollmentId,
    /// The `apns-id`, or why not.
    pub result: Result<String, NotWoken>,
}

/// Why a channel was not woken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct NotWoken {
    /// A sentence for the operator, without secrets.
    pub reason: String,
    /// When the same push may go well, if it may by itself.
    pub retry_after: Option<Duration>,
}

impl NotWoken {
    /// For a reason that stays until somebody does something.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), retry_after: None }
    }
}

impl Storage {
    /// Announces that there is something to be woken at once.
    pub fn wakes_changed(&self) -> Arc<Notify> {
        Arc::clone(&self.inner.memory.wakes_due)
    }

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
                    let asked = row.flag(2)?;
                    let wanted = if asked { IS_ENROLLED } else { IS_WAITED_FOR };
                    if tx.one(wanted, args![wake.enrollment.as_str()]).await?.is_some() {
                        tx.run(TAKE, args![now.plus(LEASE).as_millis(), now.as_millis(), wake.enrollment.as_str()]).await?;
                        taken.push(wake);
                        continue;
                    }
                    if asked {
                        mass_pushes::close(tx, &wake.enrollment, TargetState::Failed, NOT_ENROLLED, now).await?;
                    }
                    remove(tx, &wake.enrollment).await?;
                }
                Ok(Outcome::Commit(taken))
            })
        })
        .await
    }

    /// The channels were woken, or could not be, by pushes that began then: when they are to be woken next is reckoned from now.
    pub async fn woken(&self, woken: Vec<Woken>, began: Timestamp, now: Timestamp) -> Result<(), StorageError> {
        let woken: Arc<[Woken]> = woken.into_iter().filter(|woken| self.inner.memory.has_wake(&woken.enrollment)).collect();
        for start in (0..woken.len()).step_by(CHUNK) {
            let woken = Arc::clone(&woken);
            let chunk = self.write(Class::Background, move |tx| {
                let woken = Arc::clone(&woken);
                Box::pin(async move {
                    for woken in woken.iter().skip(start).take(CHUNK) {
                        record(tx, woken, began, now).await?;
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

/// Channels in one transaction: devices wait for it meanwhile.
const CHUNK: usize = 100;

pub(crate) const SELECT_ALL: &str = "SELECT enrollment_id, asked FROM wakes";
pub(crate) const SELECT_DUE: &str = "SELECT tenant_id, enrollment_id, asked FROM wakes WHERE due_at <= ? ORDER BY due_at LIMIT ?";
const SELECT_OF: &str = "SELECT due_at, step, asked, updated_at FROM wakes WHERE enrollment_id = ?";
const IS_ENROLLED: &str = "SELECT 1 FROM enrollments WHERE id = ? AND state = 'enrolled'";
// Somebody who left, or whose queue is empty, is not woken.
const IS_WAITED_FOR: &str = "SELECT 1 FROM enrollments e WHERE e.id = ? AND e.state = 'enrolled' \
    AND EXISTS (SELECT 1 FROM command_queue q WHERE q.enrollment_id = e.id AND q.is_open = 1)";
const TAKE: &str = "UPDATE wakes SET due_at = ?, taken = 1, updated_at = ? WHERE enrollment_id = ?";
const FREE: &str = "UPDATE wakes SET due_at = ?, taken = 0 WHERE taken = 1";
const POSTPONE: &str = "UPDATE wakes SET due_at = ?, step = ?, taken = 0, updated_at = ? WHERE enrollment_id = ?";
const ANSWER: &str = "UPDATE wakes SET asked = 0 WHERE enrollment_id = ?";
const INSERT_ASKED: &str = "INSERT INTO wakes (enrollment_id, tenant_id, due_at, step, asked, updated_at) VALUES (?, ?, ?, 0, 1, ?) \
    ON CONFLICT (enrollment_id) DO UPDATE SET asked = 1, step = 0, updated_at = excluded.updated_at, \
    due_at = CASE WHEN wakes.due_at < excluded.due_at THEN wakes.due_at ELSE excluded.due_at END";
const INSERT: &str = "INSERT INTO wakes (enrollment_id, tenant_id, due_at, step, updated_at) VALUES (?, ?, ?, 0, ?) \
    ON CONFLICT (enrollment_id) DO UPDATE SET updated_at = excluded.updated_at, \
    due_at = CASE WHEN wakes.due_at < excluded.due_at THEN wakes.due_at ELSE excluded.due_at END";
const DELETE: &str = "DELETE FROM wakes WHERE enrollment_id = ?";
const SELECT_OF_DEVICE: &str =
    "SELECT w.enrollment_id, w.asked FROM wakes w JOIN enrollments e ON e.id = w.enrollment_id WHERE e.id = ? OR e.parent_id = ?";

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
    let known = known(tx, id).await?;
    if known.is_none() {
        insert(tx, tenant, id, now.plus(PROMISED), now).await?;
    }
    let step = known.map_or(0, |known| known.step);
    postpone(tx, id, if comes_again { step.max(OWES_A_VISIT) } else { step }, now).await
}

/// The queue of the channel is empty.
pub(crate) async fn not_needed(tx: &mut Tx, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    // A row that was written in the same group is not known yet: it is found empty when it is due.
    let Some(asked) = tx.memory.wake(id) else { return Ok(()) };
    if asked {
        mass_pushes::close(tx, id, TargetState::Unneeded, "it came by itself before", now).await?;
    }
    remove(tx, id).await
}

/// Nothing that waited for the device or its users goes out any more.
pub(crate) async fn device_begins_anew(tx: &mut Tx, device: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    for row in tx.all(SELECT_OF_DEVICE, args![device.as_str(), device.as_str()]).await? {
        let id = EnrollmentId::new(row.text(0)?);
        if row.flag(1)? {
            mass_pushes::close(tx, &id, TargetState::Failed, NOT_ENROLLED, now).await?;
        }
        remove(tx, &id).await?;
    }
    Ok(())
}

/// Somebody wants the channel to be woken now, whether or not a command waits.
pub(crate) async fn asked(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    tx.run(INSERT_ASKED, args![id.as_str(), tenant.as_str(), now.as_millis(), now.as_millis()]).await?;
    tx.after_commit(Change::Wake(id.clone(), WakeState::Asked));
    Ok(())
}

/// Nobody is pushing when the server starts: what was taken is due at once.
pub(crate) async fn free_taken(db: &mut Db<'_>, now: Timestamp) -> Result<(), StorageError> {
    db.run(FREE, args![now.as_millis()]).await?;
    Ok(())
}

/// What became of one push.
async fn record(tx: &mut Tx, woken: &Woken, began: Timestamp, now: Timestamp) -> Result<(), StorageError> {
    let id = &woken.enrollment;
    let Some(Known { step, asked, updated_at }) = known(tx, id).await? else { return Ok(()) };
    if updated_at > began {
        // What has come up since then may be too late for that push.
        return Ok(());
    }
    let (state, detail, retry_after) = match &woken.result {
        Ok(apns_id) => (TargetState::Pushed, apns_id, None),
        Err(NotWoken { reason, retry_after }) => (TargetState::Failed, reason, *retry_after),
    };
    let again = retry_after.filter(|_| !asked || step + 1 < ATTEMPTS);
    if let Some(wait) = again {
        // Nothing has reached it: sooner than one that was woken, but each time later than before.
        let due = now.plus(wait.max(interval(step)).min(LONGEST));
        let next = (step + 1).min(STEPS);
        tx.run(POSTPONE, args![due.as_millis(), next, now.as_millis(), id.as_str()]).await?;
        return Ok(());
    }
    if asked {
        mass_pushes::close(tx, id, state, detail, now).await?;
        if tx.one(IS_WAITED_FOR, args![id.as_str()]).await?.is_none() {
            return remove(tx, id).await;
        }
        tx.run(ANSWER, args![id.as_str()]).await?;
        tx.after_commit(Change::Wake(id.clone(), WakeState::Answered));
    }
    postpone(tx, id, step.max(OWES_A_VISIT), now).await
}

async fn insert(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, due: Timestamp, now: Timestamp) -> Result<(), StorageError> {
    tx.run(INSERT, args![id.as_str(), tenant.as_str(), due.as_millis(), now.as_millis()]).await?;
    tx.after_commit(Change::Wake(id.clone(), WakeState::Waits));
    Ok(())
}

async fn remove(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    tx.run(DELETE, args![id.as_str()]).await?;
    tx.after_commit(Change::Wake(id.clone(), WakeState::Gone));
    Ok(())
}

/// Of a row.
struct Known {
    step: i64,
    asked: bool,
    /// When a push was last asked for, begun or answered.
    updated_at: Timestamp,
}

async fn known(tx: &mut Tx, id: &EnrollmentId) -> Result<Option<Known>, StorageError> {
    tx.one(SELECT_OF, args![id.as_str()]).await?.map(|row| Ok(Known { step: row.int(1)?, asked: row.flag(2)?, updated_at: row.time(3)? })).transpose()
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
