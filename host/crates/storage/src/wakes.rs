//! When channels are woken by a push.
//!
//! One row per channel, whatever asks for the push, so that a device is told once. A row is written with the command that it is for, so a
//! push that somebody was promised is made after a restart too; it goes when the queue is empty. A row that was asked for (a mass push, a
//! plugin) is good for one push even if no command waits.
//!
//! Three things are counted apart, because each says something else about the next push, and a new command or a visit ends the last two:
//! - *deferrals*: the device does not keep a command that it answered `NotNow`, and comes again by itself only if that was the last word of
//!   its session. Otherwise it is woken after a minute, then after two, up to every six hours (edge case 36).
//! - *unanswered* pushes: a device that does not come although it was woken is woken again from a quarter of an hour on, ever more rarely:
//!   Apple keeps the push for it.
//! - *failures*: what reached nobody is tried again from a minute on, or as soon as the cause is gone (a new token, another certificate).

use crate::mass_pushes::{self, NOT_ENROLLED, TargetState};
use crate::memory::{Change, WakeState};
use crate::sql::{Columns, Db, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::Notify;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// The first time between two pushes; each is twice the one before.
const FIRST: Duration = Duration::from_mins(1);
/// No longer than this.
const LONGEST: Duration = Duration::from_hours(6);
/// Doublings until [`LONGEST`].
const DOUBLINGS: i64 = 9;
/// Doublings before the first push of a device that was woken and owes a visit: about a quarter of an hour.
const OWES_A_VISIT: i64 = 4;
/// Whoever has queued a command wakes its device right after the commit. If the server dies in between, this is when it is done instead.
const PROMISED: Duration = Duration::from_secs(30);
/// Whoever has taken a wake has so long for the push.
const LEASE: Duration = Duration::from_mins(2);
/// A push that was asked for without a command is given up after so many failures, a quarter of an hour.
const ATTEMPTS: i64 = 5;
/// What was written so much later than now was written under a wrong clock.
const AHEAD: Duration = Duration::from_hours(1);
/// Rows of one look that are found not to be needed, at most.
const UNNEEDED: usize = 1000;

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

/// How much was committed when a push began: it answers what was wanted until then, and not what has come up since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known(i64);

impl Storage {
    /// Announces that there is something to be woken at once.
    pub fn wakes_changed(&self) -> Arc<Notify> {
        Arc::clone(&self.inner.memory.wakes_due)
    }

    /// To be had before a push begins, for [`Self::woken`].
    pub fn known_wakes(&self) -> Known {
        Known(self.inner.memory.committed())
    }

    /// Takes channels whose time has come, the longest due first. Whoever takes one wakes it and says so to [`Self::woken`]; otherwise it is
    /// taken again after two minutes.
    pub async fn take_due_wakes(&self, limit: u32, now: Timestamp) -> Result<Vec<Wake>, StorageError> {
        if self.look_up(SELECT_DUE, args![now.as_millis(), 1_i64]).await?.is_none() {
            return Ok(Vec::new());
        }
        self.write(Class::Background, move |tx| {
            Box::pin(async move {
                let (mut taken, mut seen) = (Vec::new(), 0);
                // Those that nobody needs any more must not hold up the others.
                while taken.len() < usize::try_from(limit).unwrap_or(usize::MAX) && seen < UNNEEDED {
                    let missing = i64::from(limit).saturating_sub(i64::try_from(taken.len()).unwrap_or(i64::MAX));
                    let due = tx.all(SELECT_DUE, args![now.as_millis(), missing]).await?;
                    if due.is_empty() {
                        break;
                    }
                    seen += due.len();
                    for row in due {
                        let wake = Wake { tenant: TenantId::new(row.text(0)?), enrollment: EnrollmentId::new(row.text(1)?) };
                        if take(tx, &wake.enrollment, row.flag(2)?, now).await? {
                            taken.push(wake);
                        }
                    }
                }
                Ok(Outcome::Commit(taken))
            })
        })
        .await
    }

    /// The channels were woken, or could not be, by pushes that began when so much was known: when they are to be woken next is reckoned from
    /// now.
    pub async fn woken(&self, woken: Vec<Woken>, known: Known, now: Timestamp) -> Result<(), StorageError> {
        let memory = &self.inner.memory;
        // A push without a row is of somebody who only wanted to push. If it reached nobody, waiting commands make it a debt.
        let matters = |woken: &Woken| {
            memory.has_wake(&woken.enrollment)
                || memory.is_pending(&woken.enrollment) && matches!(&woken.result, Err(NotWoken { retry_after: Some(_), .. }))
        };
        let woken: Arc<[Woken]> = woken.into_iter().filter(matters).collect();
        for start in (0..woken.len()).step_by(CHUNK) {
            let woken = Arc::clone(&woken);
            let chunk = self.write(Class::Background, move |tx| {
                let woken = Arc::clone(&woken);
                Box::pin(async move {
                    for woken in woken.iter().skip(start).take(CHUNK) {
                        record(tx, woken, known, now).await?;
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
        self.look_up(SELECT_OF, args![id.as_str()]).await?.map_or(Ok(None), |row| row.opt_time(0))
    }
}

/// Channels in one transaction: devices wait for it meanwhile.
const CHUNK: usize = 100;

pub(crate) const SELECT_ALL: &str = "SELECT enrollment_id FROM wakes";
pub(crate) const SELECT_DUE: &str = "SELECT tenant_id, enrollment_id, asked FROM wakes WHERE due_at <= ? ORDER BY due_at LIMIT ?";
const SELECT_OF: &str = "SELECT due_at, asked, deferrals, unanswered, failures, wanted_in FROM wakes WHERE enrollment_id = ?";
const IS_ENROLLED: &str = "SELECT 1 FROM enrollments WHERE id = ? AND state = 'enrolled'";
// When the first of the commands that its device is to be woken for may go out; NULL without any. Somebody who left is not woken, and for a
// command that was queued without a push only a device that has begun with it.
const SELECT_SENDABLE: &str = "SELECT MIN(COALESCE(q.not_before, 0)) FROM enrollments e JOIN command_queue q \
    ON q.enrollment_id = e.id AND q.is_open = 1 AND (q.wants_push = 1 OR q.state IN ('not-now', 'sent')) WHERE e.id = ? AND e.state = 'enrolled'";
const SELECT_LATER: &str = "SELECT MIN(not_before) FROM command_queue WHERE enrollment_id = ? AND is_open = 1 AND wants_push = 1 AND not_before > ?";
const TAKE: &str = "UPDATE wakes SET due_at = ?, taken = 1, updated_at = ? WHERE enrollment_id = ?";
const FREE: &str = "UPDATE wakes SET due_at = CASE WHEN taken = 1 OR updated_at > ? THEN ? ELSE due_at END, taken = 0, wanted_in = 0";
const LET_GO: &str = "UPDATE wakes SET taken = 0 WHERE enrollment_id = ?";
const CHANGE: &str = "UPDATE wakes SET due_at = ?, asked = ?, taken = 0, deferrals = ?, unanswered = ?, failures = ?, wanted_in = ?, updated_at = ? \
    WHERE enrollment_id = ?";
const INSERT: &str = "INSERT INTO wakes (enrollment_id, tenant_id, due_at, asked, taken, deferrals, unanswered, failures, wanted_in, updated_at) \
    VALUES (?, ?, ?, 0, 0, ?, ?, ?, ?, ?)";
// What is wanted now makes earlier silence and trouble unimportant; a device that defers goes on deferring.
pub(crate) const ON_CONFLICT_WANTED: &str = "ON CONFLICT (enrollment_id) DO UPDATE SET unanswered = 0, failures = 0, \
    wanted_in = excluded.wanted_in, updated_at = excluded.updated_at, \
    due_at = CASE WHEN wakes.due_at < excluded.due_at THEN wakes.due_at ELSE excluded.due_at END";
static INSERT_WANTED: LazyLock<String> = LazyLock::new(|| {
    format!(
        "INSERT INTO wakes (enrollment_id, tenant_id, due_at, asked, taken, deferrals, unanswered, failures, wanted_in, updated_at) \
        VALUES (?, ?, ?, ?, 0, 0, 0, 0, ?, ?) {ON_CONFLICT_WANTED}, asked = CASE WHEN excluded.asked = 1 THEN 1 ELSE wakes.asked END"
    )
});
const INSERT_LATER: &str = "INSERT INTO wakes (enrollment_id, tenant_id, due_at, asked, taken, deferrals, unanswered, failures, wanted_in, \
    updated_at) VALUES (?, ?, ?, 0, 0, 0, 0, 0, 0, ?) ON CONFLICT (enrollment_id) DO UPDATE SET \
    due_at = CASE WHEN wakes.due_at < excluded.due_at THEN wakes.due_at ELSE excluded.due_at END";
const WAITS_FOR_A_PUSH: &str =
    "SELECT 1 FROM command_queue WHERE enrollment_id = ? AND is_open = 1 AND (wants_push = 1 OR state = 'not-now') LIMIT 1";
const DELETE: &str = "DELETE FROM wakes WHERE enrollment_id = ?";
const SELECT_OF_DEVICE: &str =
    "SELECT w.enrollment_id, w.asked FROM wakes w JOIN enrollments e ON e.id = w.enrollment_id WHERE e.id = ? OR e.parent_id = ?";
const ADVANCE_TOPIC: &str = "UPDATE wakes SET due_at = ?, failures = 0, updated_at = ? \
    WHERE failures > 0 AND taken = 0 AND due_at > ? AND enrollment_id IN (SELECT id FROM enrollments WHERE topic = ? AND state = 'enrolled')";

/// How long after the first of such a kind, and after the second, and so on.
fn interval(doublings: i64) -> Duration {
    let doublings = u32::try_from(doublings.clamp(0, DOUBLINGS)).unwrap_or_default();
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
    match not_before.filter(|at| *at > now) {
        Some(later) => {
            tx.run(INSERT_LATER, args![id.as_str(), tenant.as_str(), later.as_millis(), now.as_millis()]).await?;
        }
        None => wanted(tx, tenant, id, now.plus(PROMISED), false, now).await?,
    }
    tx.after_commit(Change::Wake(id.clone(), WakeState::Waits));
    Ok(())
}

/// A session is over, and deferred commands remain. `comes_again` says that its last word was `NotNow`: the device comes by itself, and is
/// waited for as one that owes a visit.
pub(crate) async fn session_ended(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, comes_again: bool, now: Timestamp) -> Result<(), StorageError> {
    let row = row(tx, id).await?;
    let deferrals = row.as_ref().map_or(0, |row| row.deferrals) + i64::from(!comes_again);
    let wait = interval(if comes_again { OWES_A_VISIT } else { deferrals - 1 });
    let Some(row) = row else {
        let due = earlier(tx, id, now.plus(wait), now).await?;
        let number = tx.number();
        let args = args![id.as_str(), tenant.as_str(), due.as_millis(), deferrals, 0_i64, 0_i64, number, now.as_millis()];
        tx.run(INSERT, args).await?;
        tx.after_commit(Change::Wake(id.clone(), WakeState::Waits));
        return Ok(());
    };
    // The push that somebody asked for is not what the device came for.
    let due = if row.asked { row.due_at.min(now.plus(wait)) } else { now.plus(wait) };
    let due = earlier(tx, id, due, now).await?;
    // A push that is under way now has nothing to say of this.
    let wanted_in = tx.number();
    change(tx, id, &Row { due_at: due, deferrals, unanswered: 0, failures: 0, wanted_in, ..row }, now).await
}

/// The queue of the channel is empty.
pub(crate) async fn not_needed(tx: &mut Tx, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    // A row that was written in the same group is not known yet: it is found empty when it is due.
    if !tx.memory.has_wake(id) {
        return Ok(());
    }
    if row(tx, id).await?.is_some_and(|row| row.asked) {
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

/// The channel told a token under which it was not pushed to before: what waits is pushed now.
pub(crate) async fn can_be_woken(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    // What was queued in the same group is pushed by whoever queued it.
    let waits = tx.memory.has_wake(id) || tx.memory.is_pending(id);
    if waits && tx.one(WAITS_FOR_A_PUSH, args![id.as_str()]).await?.is_some() {
        wanted(tx, tenant, id, now, false, now).await?;
        tx.after_commit(Change::Wake(id.clone(), WakeState::Due));
    }
    Ok(())
}

/// The topic has a certificate with which it was not pushed before: what could not be pushed is tried again.
pub(crate) async fn topic_can_be_pushed(tx: &mut Tx, topic: &str, now: Timestamp) -> Result<(), StorageError> {
    tx.after_commit(Change::PushCertificate);
    if tx.run(ADVANCE_TOPIC, args![now.as_millis(), now.as_millis(), now.as_millis(), topic]).await? > 0 {
        tx.after_commit(Change::WakesDue);
    }
    Ok(())
}

/// Somebody wants the channel to be woken now, whether or not a command waits.
pub(crate) async fn asked(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    wanted(tx, tenant, id, now, true, now).await?;
    tx.after_commit(Change::Wake(id.clone(), WakeState::Due));
    Ok(())
}

/// Nobody is pushing when the server starts: what was taken is due at once, and what a wrong clock put off as well.
pub(crate) async fn free_taken(db: &mut Db<'_>, now: Timestamp) -> Result<(), StorageError> {
    db.run(FREE, args![now.plus(AHEAD).as_millis(), now.as_millis()]).await?;
    Ok(())
}

/// A due row: whether somebody is to be pushed to for it. If not, it goes, or waits for a later command.
async fn take(tx: &mut Tx, id: &EnrollmentId, asked: bool, now: Timestamp) -> Result<bool, StorageError> {
    let wanted = if asked { tx.one(IS_ENROLLED, args![id.as_str()]).await?.map(|_| now) } else { sendable(tx, id).await? };
    match wanted {
        Some(at) if at <= now => {
            tx.run(TAKE, args![now.plus(LEASE).as_millis(), now.as_millis(), id.as_str()]).await?;
            Ok(true)
        }
        Some(later) => {
            let Some(row) = row(tx, id).await? else { return Ok(false) };
            change(tx, id, &Row { due_at: later, unanswered: 0, failures: 0, ..row }, now).await?;
            Ok(false)
        }
        None => {
            if asked {
                mass_pushes::close(tx, id, TargetState::Failed, NOT_ENROLLED, now).await?;
            }
            remove(tx, id).await?;
            Ok(false)
        }
    }
}

/// What became of one push.
async fn record(tx: &mut Tx, woken: &Woken, known: Known, now: Timestamp) -> Result<(), StorageError> {
    let id = &woken.enrollment;
    let Some(row) = row(tx, id).await? else { return owe(tx, woken, now).await };
    // A push that failed may have gone out with the certificate before.
    let is_outdated = woken.result.is_err() && tx.memory.push_certificate_stored_in() > known.0;
    if row.wanted_in > known.0 || is_outdated {
        // The device may have come and gone before that was there: it is due as if this push had not been.
        tx.run(LET_GO, args![id.as_str()]).await?;
        return Ok(());
    }
    let (state, detail, retry_after) = match &woken.result {
        Ok(apns_id) => (TargetState::Pushed, apns_id, None),
        Err(NotWoken { reason, retry_after }) => (TargetState::Failed, reason, *retry_after),
    };
    let (unanswered, failures) = if woken.result.is_ok() { (row.unanswered + 1, 0) } else { (row.unanswered, row.failures + 1) };
    let again = retry_after.filter(|_| !row.asked || failures < ATTEMPTS);
    if row.asked && again.is_none() {
        mass_pushes::close(tx, id, state, detail, now).await?;
    }
    let wait = match again {
        // Nothing has reached it: sooner than one that was woken, but each time later than before.
        Some(wait) => wait.max(interval(failures - 1)).min(LONGEST),
        None => interval(OWES_A_VISIT + if woken.result.is_ok() { unanswered } else { failures } - 1),
    };
    let asked = row.asked && again.is_some();
    let mut due = now.plus(wait);
    if !asked {
        match sendable(tx, id).await? {
            None => return remove(tx, id).await,
            // Until then a push is of no use.
            Some(later) if later > now => due = later,
            Some(_) => due = earlier(tx, id, due, now).await?,
        }
    }
    change(tx, id, &Row { due_at: due, asked, unanswered, failures, ..row }, now).await
}

/// A push that nobody had to make, and that reached nobody: if commands wait, it is made again.
async fn owe(tx: &mut Tx, woken: &Woken, now: Timestamp) -> Result<(), StorageError> {
    let id = &woken.enrollment;
    let Err(NotWoken { retry_after: Some(wait), .. }) = woken.result else { return Ok(()) };
    let Some(tenant) = tx.one(SELECT_WAITING, args![id.as_str(), now.as_millis()]).await? else { return Ok(()) };
    let due = now.plus(wait.max(interval(0)).min(LONGEST));
    wanted(tx, &TenantId::new(tenant.text(0)?), id, due, true, now).await?;
    tx.after_commit(Change::Wake(id.clone(), WakeState::Waits));
    Ok(())
}

// Whose, if any command could go out.
const SELECT_WAITING: &str = "SELECT e.tenant_id FROM enrollments e WHERE e.id = ? AND e.state = 'enrolled' AND EXISTS \
    (SELECT 1 FROM command_queue q WHERE q.enrollment_id = e.id AND q.is_open = 1 AND COALESCE(q.not_before, 0) <= ?)";

async fn wanted(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, due: Timestamp, asked: bool, now: Timestamp) -> Result<(), StorageError> {
    let number = tx.number();
    tx.run(&INSERT_WANTED, args![id.as_str(), tenant.as_str(), due.as_millis(), i64::from(asked), number, now.as_millis()]).await?;
    Ok(())
}

async fn remove(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    tx.run(DELETE, args![id.as_str()]).await?;
    tx.after_commit(Change::Wake(id.clone(), WakeState::Gone));
    Ok(())
}

/// When the first of its commands may go out, if it has any.
async fn sendable(tx: &mut Tx, id: &EnrollmentId) -> Result<Option<Timestamp>, StorageError> {
    tx.one(SELECT_SENDABLE, args![id.as_str()]).await?.map_or(Ok(None), |row| row.opt_time(0))
}

/// A command that may go out before `due`, but not yet, wakes its device then.
async fn earlier(tx: &mut Tx, id: &EnrollmentId, due: Timestamp, now: Timestamp) -> Result<Timestamp, StorageError> {
    let later = tx.one(SELECT_LATER, args![id.as_str(), now.as_millis()]).await?.map_or(Ok(None), |row| row.opt_time(0))?;
    Ok(later.map_or(due, |later| later.min(due)))
}

/// What the next push is reckoned by.
struct Row {
    due_at: Timestamp,
    asked: bool,
    deferrals: i64,
    unanswered: i64,
    failures: i64,
    wanted_in: i64,
}

async fn row(tx: &mut Tx, id: &EnrollmentId) -> Result<Option<Row>, StorageError> {
    let row = tx.one(SELECT_OF, args![id.as_str()]).await?;
    row.map(|row| {
        Ok(Row {
            due_at: row.time(0)?,
            asked: row.flag(1)?,
            deferrals: row.int(2)?,
            unanswered: row.int(3)?,
            failures: row.int(4)?,
            wanted_in: row.int(5)?,
        })
    })
    .transpose()
}

async fn change(tx: &mut Tx, id: &EnrollmentId, row: &Row, now: Timestamp) -> Result<(), StorageError> {
    let Row { due_at, asked, deferrals, unanswered, failures, wanted_in } = row;
    let args = args![due_at.as_millis(), i64::from(*asked), *deferrals, *unanswered, *failures, *wanted_in, now.as_millis(), id.as_str()];
    tx.run(CHANGE, args).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Dialect;
    use sqlx::Connection as _;
    use sqlx::migrate::Migrator;

    /// A database of an earlier version knew no wakes: its commands would have waited until their devices came by themselves.
    #[tokio::test]
    async fn commands_of_an_earlier_version_have_their_wakes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("old.db");
        let mut connection = sqlx::SqliteConnection::connect(&format!("sqlite://{}?mode=rwc", path.display())).await.unwrap();
        let earlier = Dialect::Sqlite.migrator().iter().filter(|migration| migration.version < 7).cloned().collect();
        Migrator::with_migrations(earlier).run(&mut connection).await.unwrap();
        let rows = "INSERT INTO enrollments (id, tenant_id, kind, topic, state, generation, tally, re_enrolling, facts, url_params, decisions, \
            created_at, updated_at) VALUES ('A', 'default', 'device', 't', 'enrolled', 1, 1, 0, '{}', x'007B7D', '[]', 0, 0); \
            INSERT INTO commands (tenant_id, uuid, request_type, body, body_sha256, created_at) VALUES ('default', 'C', 'ProfileList', x'00', 's', 0); \
            INSERT INTO command_queue (tenant_id, enrollment_id, command_uuid, state, is_open, priority, origin, hops, wants_push, renews_identity, \
            deliveries, not_now_deliveries, not_now_count, created_at, updated_at) \
            VALUES ('default', 'A', 'C', 'queued', 1, 0, 'api:x', 0, 1, 0, 0, 0, 0, 5, 5)";
        sqlx::raw_sql(rows).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let url = format!("sqlite://{}", path.display());
        let storage = Storage::open(crate::OpenOptions { url, now: Timestamp::from_millis(100) }).await.unwrap();
        let taken = storage.take_due_wakes(10, Timestamp::from_millis(100)).await.unwrap();
        assert_eq!(taken, [Wake { tenant: TenantId::default(), enrollment: EnrollmentId::new("A") }]);
        storage.close().await.unwrap();
    }

    #[test]
    fn the_time_between_two_pushes_doubles_from_a_minute_to_six_hours() {
        let minutes: Vec<u64> = (0..12).map(|doublings| interval(doublings).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]);
        assert_eq!(interval(OWES_A_VISIT), Duration::from_mins(16));
    }
}
