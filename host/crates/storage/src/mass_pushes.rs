//! Pushes to many channels at once, which go on after whoever asked for them was answered.
//!
//! What is to be done is a [wake](crate::wakes) of each channel, so a device that is to be woken anyway is told once. What became of each is
//! kept here, for a week.

use crate::memory::{Change, WakeState};
use crate::sql::{Columns, Db, Row, args, together};
use crate::wakes::ON_CONFLICT_WANTED;
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError};
use sqlx::Connection as _;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// Many channels that are to be woken.
#[derive(Debug, Clone)]
pub struct NewMassPush {
    /// By which it is asked after; chosen by the caller, never used before.
    pub id: String,
    /// Whose channels.
    pub tenant: TenantId,
    /// `api:SUBJECT`.
    pub origin: String,
    /// Whom.
    pub targets: Targets,
    /// How fast: the devices of two mass pushes take turns.
    pub per_second: u32,
    /// When.
    pub now: Timestamp,
}

/// Whom a mass push is to wake.
#[derive(Debug, Clone)]
pub enum Targets {
    /// Each once. More than 1,000 are stored in several transactions, in order.
    These(Vec<EnrollmentId>),
    /// Everyone who is enrolled, users too, in the order of their ids. [`Storage::extend_mass_pushes`] stores what goes beyond the first 1,000.
    Everyone,
}

/// What was stored of a new mass push.
#[derive(Debug)]
pub struct BegunMassPush {
    /// Targets that are not enrolled.
    pub nobody: Vec<EnrollmentId>,
    /// Why the targets from some place on are not stored, and never will be; those before it are woken all the same.
    pub broke_off: Option<StorageError>,
}

/// How far a mass push is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MassPush {
    /// By which it was asked after.
    pub id: String,
    /// Who asked for it.
    pub origin: String,
    /// When.
    pub created_at: Timestamp,
    /// Whether all targets are stored and counted here.
    pub is_complete: bool,
    /// Not yet pushed to.
    pub waiting: u64,
    /// Apple took the push.
    pub pushed: u64,
    /// It cannot be woken; [`Self::failures`] says why.
    pub failed: u64,
    /// The device came, and left nothing undone, before it was pushed to.
    pub unneeded: u64,
    /// When the last result came.
    pub updated_at: Option<Timestamp>,
    /// The most frequent first, at most 20. None in a list.
    pub failures: Vec<MassPushFailure>,
}

/// Channels that could not be woken for the same reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MassPushFailure {
    /// A sentence.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// At most 100 of them.
    pub ids: Vec<EnrollmentId>,
}

/// What became of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TargetState {
    Pushed,
    Failed,
    Unneeded,
}

impl TargetState {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Pushed => "pushed",
            Self::Failed => "failed",
            Self::Unneeded => "unneeded",
        }
    }
}

/// Said of an id that is nobody's, or whose device left.
pub(crate) const NOT_ENROLLED: &str = "it is not enrolled";

/// Targets in one transaction, at most.
const CHUNK: usize = 1000;
/// How long what became of a mass push can be asked after.
const KEPT: Duration = Duration::from_hours(7 * 24);
/// Rows of one step of clearing away.
const STEP: i64 = 500;

const INSERT: &str = "INSERT INTO mass_pushes (id, tenant_id, origin, created_at, everyone_after) VALUES (?, ?, ?, ?, ?)";
const IS_ENROLLED: &str = "FROM enrollments WHERE id = ? AND tenant_id = ? AND state = 'enrolled'";
static INSERT_TARGET: LazyLock<String> = LazyLock::new(|| {
    together(&[
        &format!("INSERT INTO mass_push_targets (mass_push_id, enrollment_id, state) SELECT ?, id, 'waiting' {IS_ENROLLED} ON CONFLICT DO NOTHING"),
        &format!(
            "INSERT INTO wakes (enrollment_id, tenant_id, due_at, asked, taken, deferrals, unanswered, failures, wanted_in, updated_at) \
            SELECT id, tenant_id, ?, 1, 0, 0, 0, 0, ?, ? {IS_ENROLLED} {ON_CONFLICT_WANTED}, asked = 1"
        ),
    ])
});
const INSERT_NOBODY: &str = "INSERT INTO mass_push_targets (mass_push_id, enrollment_id, state, detail, done_at) VALUES (?, ?, 'failed', ?, ?) \
    ON CONFLICT DO NOTHING";
pub(crate) const CLOSE: &str = "UPDATE mass_push_targets SET state = ?, detail = ?, done_at = ? WHERE enrollment_id = ? AND state = 'waiting'";
pub(crate) const SELECT_UNFINISHED: &str =
    "SELECT id, tenant_id, created_at, everyone_after, written FROM mass_pushes WHERE everyone_after IS NOT NULL ORDER BY created_at LIMIT 1";
pub(crate) const SELECT_PAGE: &str = "SELECT id FROM enrollments WHERE tenant_id = ? AND state = 'enrolled' AND id > ? ORDER BY id LIMIT ?";
const TURN_PAGE: &str = "UPDATE mass_pushes SET everyone_after = ?, written = ? WHERE id = ?";
const SELECT: &str = "SELECT id, origin, created_at, everyone_after IS NULL FROM mass_pushes WHERE id = ? AND tenant_id = ?";
const SELECT_RECENT: &str =
    "SELECT id, origin, created_at, everyone_after IS NULL FROM mass_pushes WHERE tenant_id = ? ORDER BY created_at DESC, id LIMIT ?";
pub(crate) const COUNT: &str = "SELECT state, COUNT(*), MAX(done_at) FROM mass_push_targets WHERE mass_push_id = ? GROUP BY state";
pub(crate) const COUNT_FAILURES: &str = "SELECT detail, COUNT(*) FROM mass_push_targets WHERE mass_push_id = ? AND state = 'failed' \
    GROUP BY detail ORDER BY COUNT(*) DESC, detail LIMIT 20";
pub(crate) const SELECT_FAILED: &str = "SELECT enrollment_id FROM mass_push_targets WHERE mass_push_id = ? AND state = 'failed' AND detail = ? \
    ORDER BY enrollment_id LIMIT 100";
pub(crate) const SELECT_OLD: &str = "SELECT id FROM mass_pushes WHERE created_at <= ? ORDER BY created_at LIMIT 1";
const DELETE_OLD_TARGETS: &str = "DELETE FROM mass_push_targets WHERE mass_push_id = ? AND enrollment_id IN \
    (SELECT t.enrollment_id FROM mass_push_targets t WHERE t.mass_push_id = ? LIMIT ?)";
const DELETE_OLD: &str = "DELETE FROM mass_pushes WHERE id = ?";

impl Storage {
    /// Every target that is enrolled is to be woken from now on, also after a restart.
    ///
    /// # Errors
    /// Nothing at all was stored.
    pub async fn begin_mass_push(&self, push: NewMassPush) -> Result<BegunMassPush, StorageError> {
        let push = Arc::new(push);
        let mut begun = BegunMassPush { nobody: Vec::new(), broke_off: None };
        let targets = match &push.targets {
            Targets::These(targets) => targets.len(),
            Targets::Everyone => 0,
        };
        for start in (0..targets.max(1)).step_by(CHUNK) {
            let push = Arc::clone(&push);
            let chunk = self.write(Class::Answer, move |tx| {
                let push = Arc::clone(&push);
                Box::pin(async move { Ok(Outcome::Commit(insert_chunk(tx, &push, start).await?)) })
            });
            match chunk.await {
                Ok(nobody) => begun.nobody.extend(nobody),
                Err(error) if start == 0 => return Err(error),
                Err(error) => {
                    begun.broke_off = Some(error);
                    break;
                }
            }
        }
        Ok(begun)
    }

    /// Stores the next page of a push to everyone, if there is one that is not complete. Whether there was. Costs a read by an index otherwise.
    pub async fn extend_mass_pushes(&self, per_second: u32, now: Timestamp) -> Result<bool, StorageError> {
        if self.look_up(SELECT_UNFINISHED, args![]).await?.is_none() {
            return Ok(false);
        }
        self.write(Class::Background, move |tx| {
            Box::pin(async move {
                let Some(row) = tx.one(SELECT_UNFINISHED, args![]).await? else { return Ok(Outcome::Commit(false)) };
                let page = Page {
                    push: row.text(0)?,
                    tenant: TenantId::new(row.text(1)?),
                    created_at: row.time(2)?,
                    after: row.text(3)?,
                    written: row.count(4)?,
                };
                insert_page(tx, &page, per_second, now).await?;
                Ok(Outcome::Commit(true))
            })
        })
        .await
    }

    /// How far it is. `None`: the tenant has no such one, or it is more than a week old.
    pub async fn mass_push(&self, tenant: &TenantId, id: &str) -> Result<Option<MassPush>, StorageError> {
        // Of one moment, or the reasons would not add up to the count. It ends when it is dropped.
        let mut reader = self.inner.readers.acquire().await?;
        let mut snapshot = reader.begin().await?;
        let mut db = Db::driven(&mut snapshot, self.inner.dialect, self.keyring());
        let Some(row) = db.one(SELECT, args![id, tenant.as_str()]).await? else { return Ok(None) };
        let mut push = counted(&mut db, &row).await?;
        if push.failed > 0 {
            for row in db.all(COUNT_FAILURES, args![id]).await? {
                let reason = row.text(0)?;
                let ids = db.all(SELECT_FAILED, args![id, reason.as_str()]).await?;
                let ids = ids.iter().map(|row| Ok(EnrollmentId::new(row.text(0)?))).collect::<Result<_, StorageError>>()?;
                push.failures.push(MassPushFailure { reason, count: u64::from(row.count(1)?), ids });
            }
        }
        Ok(Some(push))
    }

    /// The tenant's mass pushes, the newest first, without their failures.
    pub async fn recent_mass_pushes(&self, tenant: &TenantId, limit: u32) -> Result<Vec<MassPush>, StorageError> {
        let mut reader = self.reader().await?;
        let mut db = reader.db();
        let mut pushes = Vec::new();
        for row in db.all(SELECT_RECENT, args![tenant.as_str(), i64::from(limit)]).await? {
            pushes.push(counted(&mut db, &row).await?);
        }
        Ok(pushes)
    }

    /// Forgets the oldest that nobody can ask after any more, in a small step. Whether there may be more.
    pub(crate) async fn clear_mass_pushes(&self, now: Timestamp) -> Result<bool, StorageError> {
        let before = now.minus(KEPT).as_millis();
        if self.read_one(SELECT_OLD, args![before]).await?.is_none() {
            return Ok(false);
        }
        self.write(Class::Background, move |tx| {
            Box::pin(async move {
                let Some(row) = tx.one(SELECT_OLD, args![before]).await? else { return Ok(Outcome::Commit(false)) };
                let id = row.text(0)?;
                if tx.run(DELETE_OLD_TARGETS, args![id.as_str(), id.as_str(), STEP]).await? == 0 {
                    tx.run(DELETE_OLD, args![id.as_str()]).await?;
                }
                Ok(Outcome::Commit(true))
            })
        })
        .await
    }
}

/// Those of the chunk that are not enrolled.
async fn insert_chunk(tx: &mut Tx, push: &NewMassPush, start: usize) -> Result<Vec<EnrollmentId>, StorageError> {
    let NewMassPush { id, tenant, origin, targets, per_second, now } = push;
    if start == 0 {
        let everyone_after = matches!(targets, Targets::Everyone).then_some("");
        tx.run(INSERT, args![id.as_str(), tenant.as_str(), origin.as_str(), now.as_millis(), everyone_after]).await?;
    }
    let Targets::These(targets) = targets else {
        let page = Page { push: id.clone(), tenant: tenant.clone(), created_at: *now, after: String::new(), written: 0 };
        insert_page(tx, &page, *per_second, *now).await?;
        return Ok(Vec::new());
    };
    let mut nobody = Vec::new();
    for (place, target) in targets.iter().enumerate().skip(start).take(CHUNK) {
        if !insert_target(tx, id, tenant, target, now.plus(turn(place, *per_second)), *now).await? {
            tx.run(INSERT_NOBODY, args![id.as_str(), target.as_str(), NOT_ENROLLED, now.as_millis()]).await?;
            nobody.push(target.clone());
        }
    }
    Ok(nobody)
}

/// How far everyone is stored.
struct Page {
    push: String,
    tenant: TenantId,
    created_at: Timestamp,
    /// The last id; empty: none yet.
    after: String,
    written: u32,
}

async fn insert_page(tx: &mut Tx, page: &Page, per_second: u32, now: Timestamp) -> Result<(), StorageError> {
    let Page { push, tenant, created_at, after, written } = page;
    let ids = tx.all(SELECT_PAGE, args![tenant.as_str(), after.as_str(), i64::try_from(CHUNK).unwrap_or(i64::MAX)]).await?;
    let mut places = *written;
    let mut last = None;
    for row in &ids {
        let target = EnrollmentId::new(row.text(0)?);
        let due = created_at.plus(turn(usize::try_from(places).unwrap_or(usize::MAX), per_second));
        insert_target(tx, push, tenant, &target, due, now).await?;
        places = places.saturating_add(1);
        last = Some(row.text(0)?);
    }
    tx.run(TURN_PAGE, args![last.filter(|_| ids.len() == CHUNK), i64::from(places), push.as_str()]).await?;
    Ok(())
}

/// Whether it is enrolled.
async fn insert_target(
    tx: &mut Tx,
    push: &str,
    tenant: &TenantId,
    target: &EnrollmentId,
    due: Timestamp,
    now: Timestamp,
) -> Result<bool, StorageError> {
    let (id, of) = (target.as_str(), tenant.as_str());
    let args = args![push, id, of, due.as_millis(), tx.number(), now.as_millis(), id, of];
    let is_enrolled = tx.run(&INSERT_TARGET, args).await? > 0;
    if is_enrolled {
        tx.after_commit(Change::Wake(target.clone(), WakeState::Due));
    }
    Ok(is_enrolled)
}

/// The push of that row of [`SELECT`].
async fn counted(db: &mut Db<'_>, row: &Row) -> Result<MassPush, StorageError> {
    let mut push = MassPush {
        id: row.text(0)?,
        origin: row.text(1)?,
        created_at: row.time(2)?,
        is_complete: row.flag(3)?,
        waiting: 0,
        pushed: 0,
        failed: 0,
        unneeded: 0,
        updated_at: None,
        failures: Vec::new(),
    };
    for row in db.all(COUNT, args![push.id.as_str()]).await? {
        let count = u64::from(row.count(1)?);
        match row.text(0)?.as_str() {
            "waiting" => push.waiting = count,
            "pushed" => push.pushed = count,
            "failed" => push.failed = count,
            _ => push.unneeded = count,
        }
        push.updated_at = push.updated_at.max(row.opt_time(2)?);
    }
    Ok(push)
}

/// When the channel at that place is due, from the beginning.
fn turn(place: usize, per_second: u32) -> Duration {
    Duration::from_millis(u64::try_from(place).unwrap_or(u64::MAX).saturating_mul(1000) / u64::from(per_second.max(1)))
}

/// What became of the channel's push, for everyone who asked for one.
pub(crate) async fn close(tx: &mut Tx, target: &EnrollmentId, state: TargetState, detail: &str, now: Timestamp) -> Result<(), StorageError> {
    tx.run(CLOSE, args![state.as_str(), detail, now.as_millis(), target.as_str()]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_of_a_mass_push_are_spread_over_time() {
        let turns: Vec<u128> = [0, 1, 500, 1000, 100_000].into_iter().map(|place| turn(place, 500).as_millis()).collect();
        assert_eq!(turns, [0, 2, 1000, 2000, 200_000]);
        assert_eq!(turn(5, 0), Duration::from_secs(5));
    }
}
