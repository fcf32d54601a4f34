//! Commands: the queue of each enrollment, and what devices report.
//!
//! A command's state is `queued`, `reviewing` or `held` before it goes out, `sent` or `not-now` while the device has it, and
//! `acknowledged`, `errored`, `expired` or `cancelled` at the end. The order is priority, then the sequence of the queue.

use crate::device_messages::{heard, heard_orphan};
use crate::enrollments::{configuration_released, erase_begins, erase_fails, is_known, renewal_begins, renewal_ends, renewal_fails};
use crate::events::{Cause, Happened, emit, redacted, wanted};
use crate::keyring::Keyring;
use crate::memory::Change;
use crate::sql::{self, Columns, args, together};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, millis, sealed, tenant, wakes};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::fmt;
use std::sync::{Arc, LazyLock};
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::report::Status;
use wasmdm_protocol::time::Timestamp;

/// How a command is queued.
#[derive(Debug, Clone, Default)]
pub struct CommandOptions {
    /// The same key again (of the same origin, for the same enrollment) is the same command.
    pub idempotency_key: Option<String>,
    /// Replaces an open command of the same key and origin that was not yet sent.
    pub collapse_key: Option<String>,
    /// Higher goes first; 0 is usual.
    pub priority: i8,
    /// Not sent earlier.
    pub not_before: Option<Timestamp>,
    /// Not sent later.
    pub expires_at: Option<Timestamp>,
    /// Wake the device.
    pub push: bool,
    /// It makes the device enroll anew with another certificate, and what follows is no new enrollment: for a day after it went out, an
    /// Authenticate of the device keeps queue and tokens.
    pub renews_identity: bool,
}

/// A command for several enrollments.
#[derive(Debug, Clone)]
pub struct Enqueue {
    /// Whose enrollments.
    pub tenant: TenantId,
    /// For whom. More than 1,000 are queued in several transactions, in order.
    pub targets: Vec<EnrollmentId>,
    /// What.
    pub command: Command,
    /// How.
    pub options: CommandOptions,
    /// `api:SUBJECT` or `plugin:NAME`.
    pub origin: String,
    /// When.
    pub now: Timestamp,
}

/// One per target, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnqueueOutcome {
    /// It waits.
    Queued {
        /// Its `CommandUUID`.
        uuid: String,
    },
    /// The same command again (same UUID and bytes, or same idempotency key): nothing changed. `uuid` is that of the first.
    AlreadyQueued {
        /// Of the first.
        uuid: String,
    },
    /// The tenant has no such enrollment.
    UnknownEnrollment,
    /// The UUID was used by this tenant with other bytes.
    UuidReused,
    /// The same command again, but nothing of that UUID will be delivered to this enrollment.
    NotAgain(NotAgain),
}

/// Why a command that is queued again does not go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAgain {
    /// It was cancelled, by somebody or because the device began anew.
    Cancelled,
    /// Its time was over.
    Expired,
    /// The device has answered it, but in an enrollment before this one.
    EarlierEnrollment,
}

impl fmt::Display for NotAgain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancelled => "this command was cancelled",
            Self::Expired => "this command expired",
            Self::EarlierEnrollment => "this command was answered in an earlier enrollment of the device",
        })
    }
}

/// A command on its way to a device.
#[derive(Clone, PartialEq, Eq)]
pub struct NextCommand {
    /// Its `CommandUUID`.
    pub uuid: String,
    /// Its `RequestType`.
    pub request_type: String,
    /// As it was queued, to the byte.
    pub body: Bytes,
    /// 1 at the first delivery.
    pub deliveries: u32,
}

/// Without the body: commands carry passwords and keys.
impl fmt::Debug for NextCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextCommand")
            .field("uuid", &self.uuid)
            .field("request_type", &self.request_type)
            .field("deliveries", &self.deliveries)
            .finish_non_exhaustive()
    }
}

/// What a poll may be answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offer {
    /// One that was sent and not answered comes again, and first.
    pub reoffer_sent: bool,
    /// The device's identity has expired: it gets nothing but a command that renews it.
    pub only_renewals: bool,
}

/// A report that belongs to the enrollment.
#[derive(Clone)]
pub struct ReportInput {
    /// The tenant of the certificate.
    pub tenant: TenantId,
    /// Who reports.
    pub id: EnrollmentId,
    /// Never `Idle`. `None`: malformed, stored as `errored(parse)`.
    pub status: Option<Status>,
    /// Of which command.
    pub command_uuid: String,
    /// As received.
    pub raw: Bytes,
    /// Parsed.
    pub document: Option<wasmdm_protocol::plist::Value>,
    /// When it arrived.
    pub now: Timestamp,
}

/// Without the bytes.
impl fmt::Debug for ReportInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReportInput")
            .field("tenant", &self.tenant)
            .field("id", &self.id)
            .field("status", &self.status)
            .field("command_uuid", &self.command_uuid)
            .finish_non_exhaustive()
    }
}

/// What became of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded {
    /// The command is finished.
    Final,
    /// The command waits for a later session.
    NotNow,
    /// The same report again.
    Repeated,
    /// Of no command that is open: kept apart.
    Orphan,
    /// The enrollment is unknown; or the report is malformed and its UUID was never sent to this enrollment or its users. Nothing was
    /// written.
    Refused,
}

/// Where a command stands.
#[derive(Clone)]
pub struct CommandStatus {
    /// Its `CommandUUID`.
    pub uuid: String,
    /// Its `RequestType`.
    pub request_type: String,
    /// queued, sent, not-now, acknowledged, errored, expired, cancelled (final schema has more).
    pub state: String,
    /// Who queued it.
    pub origin: String,
    /// How often it was sent.
    pub deliveries: u32,
    /// When it was queued.
    pub created_at: Timestamp,
    /// When its state changed.
    pub updated_at: Timestamp,
    /// Raw, if any report was stored.
    pub report: Option<Bytes>,
}

/// Without the report.
impl fmt::Debug for CommandStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandStatus")
            .field("uuid", &self.uuid)
            .field("request_type", &self.request_type)
            .field("state", &self.state)
            .field("origin", &self.origin)
            .field("deliveries", &self.deliveries)
            .finish_non_exhaustive()
    }
}

/// Targets in one transaction, at most.
const TARGETS: usize = 1000;

impl Storage {
    /// One outcome per target, in order; an unknown target does not fail the others.
    pub async fn enqueue(&self, enqueue: Enqueue) -> Result<Vec<EnqueueOutcome>, StorageError> {
        let mut outcomes = Vec::with_capacity(enqueue.targets.len());
        let enqueue = Arc::new(enqueue);
        let mut start = 0;
        while start < enqueue.targets.len() {
            let enqueue = Arc::clone(&enqueue);
            let part = self.write(Class::Answer, move |tx| {
                let enqueue = Arc::clone(&enqueue);
                Box::pin(async move {
                    let mut outcomes = Vec::new();
                    for target in enqueue.targets.iter().skip(start).take(TARGETS) {
                        let Enqueue { tenant, command, options, origin, now, .. } = &*enqueue;
                        let queued = Queueing { tenant, target, command, options, origin, cause: &Cause::default(), now: *now };
                        outcomes.push(queue(tx, &queued).await?);
                    }
                    Ok(Outcome::Commit(outcomes))
                })
            });
            outcomes.extend(part.await?);
            start += TARGETS;
        }
        Ok(outcomes)
    }

    /// An Idle poll: clears `NotNow` marks (if there are any), then offers the next command. Nothing pending: no database work at all on
    /// SQLite.
    pub async fn poll(&self, tenant: &TenantId, id: &EnrollmentId, offer: Offer, now: Timestamp) -> Result<Option<NextCommand>, StorageError> {
        if !self.inner.memory.is_pending(id) {
            return Ok(None);
        }
        let (tenant, id) = (tenant.clone(), id.clone());
        self.write(Class::Answer, move |tx| {
            let (tenant, id) = (tenant.clone(), id.clone());
            Box::pin(async move { Ok(Outcome::Commit(poll(tx, &tenant, &id, offer, now).await?)) })
        })
        .await
    }

    /// Stores a report and takes the next command of the same channel, in one transaction. After a report no command that stands at `NotNow` is offered, and one
    /// that was sent only if the report is a repeated one: its answer was lost. `only_renewals` is that of [`Offer`].
    pub async fn report(&self, report: ReportInput, only_renewals: bool) -> Result<(Recorded, Option<NextCommand>), StorageError> {
        let input = Arc::new(report);
        self.write(Class::Answer, move |tx| {
            let input = Arc::clone(&input);
            Box::pin(async move {
                let (recorded, whose) = report_of(tx, &input).await?;
                // A device that reports the same again has not read the answer, and so not the command in it: that one comes first.
                let reoffer_sent = recorded == Recorded::Repeated;
                match recorded {
                    Recorded::Refused => {}
                    Recorded::Orphan => heard_orphan(tx, &input.tenant, &whose, input.now).await?,
                    Recorded::Final | Recorded::NotNow | Recorded::Repeated => heard(tx, &input.tenant, &whose, None, input.now).await?,
                }
                let offer = Offer { reoffer_sent, only_renewals };
                if recorded == Recorded::Refused {
                    return Ok(Outcome::Commit((recorded, None)));
                }
                let next = next(tx, &input.tenant, &whose, offer, input.now).await?;
                if matches!(next, Next::Later) && tx.one(HAS_DEFERRED, args![whose.as_str()]).await?.is_some() {
                    wakes::session_ended(tx, &input.tenant, &whose, recorded == Recorded::NotNow, input.now).await?;
                }
                Ok(Outcome::Commit((recorded, next.command())))
            })
        })
        .await
    }

    /// What a device, or a user of it, was last given and has not answered: the enrollment and the `CommandUUID`. A report of which nothing
    /// could be read is taken for its answer.
    pub async fn last_sent(&self, tenant: &TenantId, device: &EnrollmentId) -> Result<Option<(EnrollmentId, String)>, StorageError> {
        let row = self.read_one(SELECT_LAST_SENT, args![device.as_str(), device.as_str()]).await?.map(|row| Row::of(&row)).transpose()?;
        Ok(row.filter(|row| row.tenant == *tenant).map(|row| (row.enrollment, row.uuid)))
    }

    /// Ends a command that was sent and whose report is never taken, as errored. `false`: it was answered meanwhile.
    pub async fn end_oversized(&self, tenant: &TenantId, id: &EnrollmentId, uuid: &str, now: Timestamp) -> Result<bool, StorageError> {
        let (tenant, id, uuid) = (tenant.clone(), id.clone(), uuid.to_owned());
        self.write(Class::Answer, move |tx| {
            let (tenant, id, uuid) = (tenant.clone(), id.clone(), uuid.clone());
            Box::pin(async move {
                let row = tx.one(SELECT_QUEUED, args![id.as_str(), uuid.as_str(), tenant.as_str()]).await?;
                let Some(row) = row.map(|row| Row::of(&row)).transpose()?.filter(|row| row.state == "sent") else {
                    return Ok(Outcome::Commit(false));
                };
                finish_with_result(tx, &row, "errored", TOO_LARGE, &Bytes::new(), now).await?;
                emit_row(tx, &row, "command.errored", TOO_LARGE, None, &Cause::default(), now).await?;
                if row.renews_identity {
                    renewal_fails(tx, &row.enrollment, &row.uuid).await?;
                }
                Ok(Outcome::Commit(true))
            })
        })
        .await
    }

    /// Open commands in the order in which they go out, at most 1,000.
    pub async fn pending_commands(&self, tenant: &TenantId, id: &EnrollmentId) -> Result<Vec<CommandStatus>, StorageError> {
        let rows = self.read_all(SELECT_OPEN, args![id.as_str(), tenant.as_str()]).await?;
        rows.iter().map(|row| status(self.keyring(), tenant, id, row)).collect()
    }

    /// Where one command of an enrollment stands.
    pub async fn command_status(&self, tenant: &TenantId, id: &EnrollmentId, uuid: &str) -> Result<Option<CommandStatus>, StorageError> {
        let row = self.look_up(SELECT_STATUS, args![id.as_str(), uuid, tenant.as_str()]).await?;
        row.map(|row| status(self.keyring(), tenant, id, &row)).transpose()
    }

    /// Whose command a report is about that does not say it, as [`Self::report`] would find it: the device's, or that of one of its users.
    pub async fn channel_of_sent_command(&self, tenant: &TenantId, id: &EnrollmentId, uuid: &str) -> Result<Option<EnrollmentId>, StorageError> {
        let row = self.read_one(SELECT_SENT_TO, args![tenant.as_str(), uuid, id.as_str(), id.as_str(), id.as_str()]).await?;
        row.map(|row| Ok(EnrollmentId::new(row.text(2)?))).transpose()
    }

    /// `false`: finished or unknown.
    pub async fn cancel_command(&self, tenant: &TenantId, id: &EnrollmentId, uuid: &str, now: Timestamp) -> Result<bool, StorageError> {
        let (tenant, id, uuid) = (tenant.clone(), id.clone(), uuid.to_owned());
        self.write(Class::Answer, move |tx| {
            let (tenant, id, uuid) = (tenant.clone(), id.clone(), uuid.clone());
            Box::pin(async move { Ok(Outcome::Commit(cancel(tx, &tenant, &id, &uuid, &Cause::default(), now).await?)) })
        })
        .await
    }

    /// Expires what is due, and clears away old rows in small steps; called every few seconds. Answers how many commands expired.
    pub async fn expire_commands(&self, now: Timestamp) -> Result<u64, StorageError> {
        let mut expired = 0;
        while self.look_up(SELECT_EXPIRED, args![now.as_millis()]).await?.is_some() {
            let step = self.write(Class::Background, move |tx| {
                Box::pin(async move {
                    let rows = tx.all(SELECT_EXPIRED, args![now.as_millis()]).await?;
                    for row in &rows {
                        finish(tx, &Row::of(row)?, "expired", &Cause::default(), now).await?;
                    }
                    Ok(Outcome::Commit(u64::try_from(rows.len()).unwrap_or(u64::MAX)))
                })
            });
            let step = step.await?;
            expired += step;
            if step == 0 {
                break;
            }
        }
        self.clear_away(now).await?;
        Ok(expired)
    }

    /// Reports that belonged to no open command, newest first.
    pub async fn orphan_reports(&self, tenant: &TenantId, id: &EnrollmentId, limit: u32) -> Result<Vec<OrphanReport>, StorageError> {
        let rows = self.read_all(SELECT_ORPHANS, args![id.as_str(), tenant.as_str(), i64::from(limit)]).await?;
        rows.iter()
            .map(|row| {
                let place: [&(dyn fmt::Display + Sync); 3] = [id, &row.text(0)?, &row.int(3)?];
                let report = self.keyring().at(&sealed::ORPHAN_REPORT, tenant, &place).open(row.blob(2)?)?;
                // Those of earlier versions are whole.
                let length = match row.opt_int(4)? {
                    Some(length) => u64::try_from(length).unwrap_or_default(),
                    None => u64::try_from(report.len()).unwrap_or(u64::MAX),
                };
                Ok(OrphanReport { command_uuid: row.text(0)?, status: row.text(1)?, report, length, received_at: row.time(3)? })
            })
            .collect()
    }
}

/// Of a longer orphan no more is kept: a device can send as many as it likes.
pub const LONGEST_ORPHAN: usize = 1024 * 1024;

/// A report that belonged to no open command.
#[derive(Clone)]
pub struct OrphanReport {
    /// The `CommandUUID` that it names.
    pub command_uuid: String,
    /// Its status.
    pub status: String,
    /// As received, up to [`LONGEST_ORPHAN`].
    pub report: Bytes,
    /// How long it was: what is beyond `report` was cut off.
    pub length: u64,
    /// When.
    pub received_at: Timestamp,
}

/// Without the bytes.
impl fmt::Debug for OrphanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OrphanReport").field("command_uuid", &self.command_uuid).field("status", &self.status).finish_non_exhaustive()
    }
}

/// Orphans that are kept of a device and its users together, and their bytes. The newest stays.
const ORPHANS: i64 = 100;
const ORPHAN_BYTES: i64 = 1024 * 1024;

macro_rules! select_queue {
    ($rest:literal) => {
        concat!(
            "SELECT q.sequence, q.tenant_id, q.enrollment_id, q.command_uuid, c.request_type, q.state, q.deliveries, q.not_now_deliveries, ",
            "q.origin, q.expires_at, q.idempotency_key, q.priority, q.renews_identity FROM command_queue q JOIN commands c ON c.tenant_id = q.tenant_id AND c.uuid = q.command_uuid ",
            $rest
        )
    };
}

pub(crate) const SELECT_QUEUED: &str = select_queue!("WHERE q.enrollment_id = ? AND q.command_uuid = ? AND q.tenant_id = ?");
// What a malformed report may be about: only what was sent to the enrollment or to one of its users.
pub(crate) const SELECT_SENT_TO: &str = select_queue!(
    "WHERE q.tenant_id = ? AND q.command_uuid = ? AND q.deliveries > 0 \
     AND (q.enrollment_id = ? OR q.enrollment_id IN (SELECT id FROM enrollments WHERE parent_id = ?)) \
     ORDER BY q.is_open DESC, CASE WHEN q.enrollment_id = ? THEN 0 ELSE 1 END, q.sequence LIMIT 1"
);
/// What a device has last been given, on its own channel or a user's, and has not answered.
pub(crate) const SELECT_LAST_SENT: &str = select_queue!(
    "WHERE q.is_open = 1 AND q.state = 'sent' AND q.enrollment_id IN (SELECT id FROM enrollments WHERE id = ? OR parent_id = ?) \
     ORDER BY q.sent_at DESC, q.sequence DESC LIMIT 1"
);
pub(crate) const SELECT_EXPIRED: &str = select_queue!("WHERE q.is_open = 1 AND q.expires_at <= ? ORDER BY q.expires_at LIMIT 100");
pub(crate) const SELECT_COLLAPSED: &str =
    select_queue!("WHERE q.is_open = 1 AND q.enrollment_id = ? AND q.collapse_key = ? AND q.origin = ? AND q.state <> 'sent'");
pub(crate) const SELECT_OPEN_OF_DEVICE: &str =
    select_queue!("WHERE q.is_open = 1 AND q.enrollment_id IN (SELECT id FROM enrollments WHERE id = ? OR parent_id = ?) ORDER BY q.sequence");
/// The first command of a state that may go out, with its body. Between Authenticate and TokenUpdate, and after CheckOut, a device is told
/// nothing; in quarantine (a user's is its device's) only what a person or the plugin that put it there has queued.
pub(crate) const SELECT_NEXT: &str = concat!(
    "SELECT q.sequence, q.tenant_id, q.enrollment_id, q.command_uuid, c.request_type, q.state, q.deliveries, q.not_now_deliveries, ",
    "q.origin, q.expires_at, q.idempotency_key, q.priority, q.renews_identity, c.body FROM command_queue q ",
    "JOIN commands c ON c.tenant_id = q.tenant_id AND c.uuid = q.command_uuid ",
    "JOIN enrollments e ON e.id = q.enrollment_id LEFT JOIN enrollments p ON p.id = e.parent_id ",
    "WHERE q.is_open = 1 AND q.enrollment_id = ? AND q.tenant_id = ? AND q.state = ? AND (q.not_before IS NULL OR q.not_before <= ?) ",
    "AND (q.expires_at IS NULL OR q.expires_at > ?) AND (? = 0 OR q.renews_identity = 1) AND e.state = 'enrolled' ",
    "AND (COALESCE(p.quarantined_by, e.quarantined_by) IS NULL OR q.origin LIKE 'api:%' ",
    "OR q.origin = CONCAT('plugin:', COALESCE(p.quarantined_by, e.quarantined_by))) ",
    "ORDER BY q.priority DESC, q.sequence LIMIT 1"
);
const SELECT_COMMAND: &str = "SELECT body_sha256 FROM commands WHERE tenant_id = ? AND uuid = ?";
const INSERT_COMMAND: &str = "INSERT INTO commands (tenant_id, uuid, request_type, body, body_sha256, created_at) VALUES (?, ?, ?, ?, ?, ?)";
pub(crate) const SELECT_BY_KEY: &str =
    "SELECT command_uuid FROM command_queue WHERE tenant_id = ? AND origin = ? AND enrollment_id = ? AND idempotency_key = ?";
const INSERT_QUEUED: &str = "INSERT INTO command_queue \
    (tenant_id, enrollment_id, command_uuid, state, is_open, priority, not_before, expires_at, collapse_key, idempotency_key, origin, hops, \
     wants_push, renews_identity, deliveries, not_now_deliveries, not_now_count, created_at, updated_at) \
    VALUES (?, ?, ?, 'queued', 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0, 0, ?, ?)";
pub(crate) const CLEAR_NOT_NOW: &str =
    "UPDATE command_queue SET state = 'queued', updated_at = ? WHERE is_open = 1 AND enrollment_id = ? AND state = 'not-now'";
const MARK_SENT: &str = "UPDATE command_queue SET state = 'sent', deliveries = deliveries + 1, sent_at = ?, updated_at = ? WHERE sequence = ?";
const MARK_NOT_NOW: &str = "UPDATE command_queue SET state = 'not-now', not_now_deliveries = deliveries, not_now_count = not_now_count + 1, updated_at = ? \
    WHERE sequence = ?";
const FINISH: &str = "UPDATE command_queue SET state = ?, is_open = 0, updated_at = ?, finished_at = ? WHERE sequence = ?";
const FINISH_ALL_OF_DEVICE: &str = "UPDATE command_queue SET state = 'cancelled', is_open = 0, updated_at = ?, finished_at = ? \
    WHERE is_open = 1 AND enrollment_id IN (SELECT id FROM enrollments WHERE id = ? OR parent_id = ?)";
pub(crate) const HAS_OPEN: &str = "SELECT 1 FROM command_queue WHERE is_open = 1 AND enrollment_id = ? LIMIT 1";
pub(crate) const HAS_DEFERRED: &str = "SELECT 1 FROM command_queue WHERE is_open = 1 AND enrollment_id = ? AND state = 'not-now' LIMIT 1";
const SELECT_RESULT: &str = "SELECT status, report FROM command_results WHERE enrollment_id = ? AND command_uuid = ?";
const UPSERT_RESULT: &str = "INSERT INTO command_results (tenant_id, enrollment_id, command_uuid, status, is_final, report, received_at) \
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (enrollment_id, command_uuid) DO UPDATE SET status = excluded.status, \
    is_final = excluded.is_final, report = excluded.report, received_at = excluded.received_at";
static FINISH_WITH_RESULT: LazyLock<String> = LazyLock::new(|| together(&[UPSERT_RESULT, FINISH]));
const INSERT_ORPHAN: &str = "INSERT INTO orphan_reports (tenant_id, enrollment_id, command_uuid, status, report, received_at, length, device_id) \
    SELECT ?, ?, ?, ?, ?, ?, ?, COALESCE(parent_id, id) FROM enrollments WHERE id = ?";
const TRIM_ORPHANS: &str = "DELETE FROM orphan_reports WHERE sequence IN (SELECT sequence FROM (SELECT sequence, \
    ROW_NUMBER() OVER (ORDER BY sequence DESC) AS place, SUM(LENGTH(report)) OVER (ORDER BY sequence DESC) AS bytes \
    FROM orphan_reports WHERE device_id = (SELECT COALESCE(parent_id, id) FROM enrollments WHERE id = ?)) kept WHERE place > ? OR (place > 1 AND bytes > ?))";
const SELECT_ORPHANS: &str = "SELECT command_uuid, status, report, received_at, length FROM orphan_reports WHERE enrollment_id = ? AND tenant_id = ? \
    ORDER BY sequence DESC LIMIT ?";
const SELECT_PARENT: &str = "SELECT parent_id FROM enrollments WHERE id = ? AND tenant_id = ?";
// Whether a command was sent to its device as it is enrolled now, and not in an enrollment before.
const IS_OF_THIS_ENROLLMENT: &str = "SELECT 1 FROM command_queue q JOIN enrollments e ON e.id = q.enrollment_id \
    LEFT JOIN enrollments p ON p.id = e.parent_id WHERE q.sequence = ? AND q.sent_at >= COALESCE(p.authenticated_at, e.authenticated_at)";
const WAS_ANSWERED_IN_THIS_ENROLLMENT: &str = "SELECT 1 FROM command_queue q JOIN enrollments e ON e.id = q.enrollment_id \
    LEFT JOIN enrollments p ON p.id = e.parent_id WHERE q.sequence = ? AND q.finished_at >= COALESCE(p.authenticated_at, e.authenticated_at, 0)";
pub(crate) const FORGET_KEYS: &str = "UPDATE command_queue SET idempotency_key = NULL \
    WHERE idempotency_key IS NOT NULL AND enrollment_id IN (SELECT id FROM enrollments WHERE id = ? OR parent_id = ?)";

macro_rules! select_status {
    ($rest:literal) => {
        concat!(
            "SELECT q.command_uuid, c.request_type, q.state, q.origin, q.deliveries, q.created_at, q.updated_at, r.report ",
            "FROM command_queue q JOIN commands c ON c.tenant_id = q.tenant_id AND c.uuid = q.command_uuid ",
            "LEFT JOIN command_results r ON r.enrollment_id = q.enrollment_id AND r.command_uuid = q.command_uuid ",
            $rest
        )
    };
}
const SELECT_OPEN: &str =
    select_status!("WHERE q.is_open = 1 AND q.enrollment_id = ? AND q.tenant_id = ? ORDER BY q.priority DESC, q.sequence LIMIT 1000");
const SELECT_STATUS: &str = select_status!("WHERE q.enrollment_id = ? AND q.command_uuid = ? AND q.tenant_id = ?");

fn status(keyring: &Keyring, tenant: &TenantId, id: &EnrollmentId, row: &sql::Row) -> Result<CommandStatus, StorageError> {
    Ok(CommandStatus {
        uuid: row.text(0)?,
        request_type: row.text(1)?,
        state: row.text(2)?,
        origin: row.text(3)?,
        deliveries: row.count(4)?,
        created_at: row.time(5)?,
        updated_at: row.time(6)?,
        report: keyring.at(&sealed::REPORT, tenant, &[id, &row.text(0)?]).open_opt(row.opt_blob(7)?)?,
    })
}

/// A row of the queue.
struct Row {
    sequence: i64,
    tenant: TenantId,
    enrollment: EnrollmentId,
    uuid: String,
    request_type: String,
    state: String,
    deliveries: i64,
    not_now_deliveries: i64,
    origin: String,
    expires_at: Option<Timestamp>,
    idempotency_key: Option<String>,
    priority: i64,
    renews_identity: bool,
}

impl Row {
    fn of(row: &sql::Row) -> Result<Self, StorageError> {
        Ok(Self {
            sequence: row.int(0)?,
            tenant: tenant(row, 1)?,
            enrollment: EnrollmentId::new(row.text(2)?),
            uuid: row.text(3)?,
            request_type: row.text(4)?,
            state: row.text(5)?,
            deliveries: row.int(6)?,
            not_now_deliveries: row.int(7)?,
            origin: row.text(8)?,
            expires_at: row.opt_time(9)?,
            idempotency_key: row.opt_text(10)?,
            priority: row.int(11)?,
            renews_identity: row.flag(12)?,
        })
    }

    fn is_open(&self) -> bool {
        matches!(self.state.as_str(), "queued" | "reviewing" | "held" | "sent" | "not-now")
    }
}

/// A command for one enrollment, on its way into the queue.
pub(crate) struct Queueing<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) target: &'a EnrollmentId,
    pub(crate) command: &'a Command,
    pub(crate) options: &'a CommandOptions,
    pub(crate) origin: &'a str,
    pub(crate) cause: &'a Cause,
    pub(crate) now: Timestamp,
}

pub(crate) async fn queue(tx: &mut Tx, new: &Queueing<'_>) -> Result<EnqueueOutcome, StorageError> {
    let Queueing { tenant, target, command, options, origin, cause, now } = *new;
    if !is_known(tx, tenant, target).await? {
        return Ok(EnqueueOutcome::UnknownEnrollment);
    }
    if let Some(key) = &options.idempotency_key
        && let Some(row) = tx.one(SELECT_BY_KEY, args![tenant.as_str(), origin, target.as_str(), key.as_str()]).await?
    {
        return Ok(EnqueueOutcome::AlreadyQueued { uuid: row.text(0)? });
    }
    match tx.one(SELECT_COMMAND, args![tenant.as_str(), command.uuid.as_str()]).await? {
        Some(row) if !tx.keyring.is_digest_of(&row.text(0)?, &command.raw)? => return Ok(EnqueueOutcome::UuidReused),
        Some(_) => {
            if let Some(row) = tx.one(SELECT_QUEUED, args![target.as_str(), command.uuid.as_str(), tenant.as_str()]).await? {
                return Ok(match not_again(tx, &Row::of(&row)?).await? {
                    Some(why) => EnqueueOutcome::NotAgain(why),
                    None => EnqueueOutcome::AlreadyQueued { uuid: command.uuid.clone() },
                });
            }
        }
        None => {
            let body = tx.keyring.at(&sealed::COMMAND_BODY, tenant, &[&command.uuid]).seal(&command.raw)?;
            let digest = tx.keyring.digest(&command.raw);
            let args = args![tenant.as_str(), command.uuid.as_str(), command.request_type.as_str(), body, digest, now.as_millis()];
            tx.run(INSERT_COMMAND, args).await?;
        }
    }
    if let Some(key) = &options.collapse_key {
        for row in tx.all(SELECT_COLLAPSED, args![target.as_str(), key.as_str(), origin]).await? {
            finish(tx, &Row::of(&row)?, "cancelled", cause, now).await?;
        }
    }
    tx.run(
        INSERT_QUEUED,
        args![
            tenant.as_str(),
            target.as_str(),
            command.uuid.as_str(),
            i64::from(options.priority),
            millis(options.not_before),
            millis(options.expires_at),
            options.collapse_key.as_deref(),
            options.idempotency_key.as_deref(),
            origin,
            i64::from(cause.hops),
            i64::from(options.push),
            i64::from(options.renews_identity),
            now.as_millis(),
            now.as_millis(),
        ],
    )
    .await?;
    tx.after_commit(Change::Pending(target.clone(), true));
    if options.push {
        wakes::command_waits(tx, tenant, target, options.not_before, now).await?;
    }
    let about = About {
        uuid: &command.uuid,
        request_type: &command.request_type,
        status: "queued",
        origin,
        idempotency_key: options.idempotency_key.as_deref(),
    };
    emit_command(tx, tenant, target, "command.queued", &about, None, cause, now).await?;
    Ok(EnqueueOutcome::Queued { uuid: command.uuid.clone() })
}

/// A caller who sends a command again because the answer was lost is told that all is well while the device has it, will have it, or has
/// answered it. It is not well if the device never gets it.
async fn not_again(tx: &mut Tx, row: &Row) -> Result<Option<NotAgain>, StorageError> {
    Ok(match row.state.as_str() {
        "cancelled" => Some(NotAgain::Cancelled),
        "expired" => Some(NotAgain::Expired),
        _ if row.is_open() || tx.one(WAS_ANSWERED_IN_THIS_ENROLLMENT, args![row.sequence]).await?.is_some() => None,
        _ => Some(NotAgain::EarlierEnrollment),
    })
}

async fn poll(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, offer: Offer, now: Timestamp) -> Result<Option<NextCommand>, StorageError> {
    tx.run(CLEAR_NOT_NOW, args![now.as_millis(), id.as_str()]).await?;
    Ok(next(tx, tenant, id, offer, now).await?.command())
}

/// What a session goes on with.
enum Next {
    Command(NextCommand),
    /// Nothing now, but there are open commands.
    Later,
    /// The queue is empty.
    Nothing,
}

impl Next {
    fn command(self) -> Option<NextCommand> {
        match self {
            Self::Command(command) => Some(command),
            Self::Later | Self::Nothing => None,
        }
    }
}

/// Expired commands that one request finds on its way and marks; more are left to the sweep, and skipped.
const EXPIRED_ON_THE_WAY: usize = 32;

/// Takes the next command that may go out.
async fn next(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, offer: Offer, now: Timestamp) -> Result<Next, StorageError> {
    let mut found_expired = 0;
    let mut chosen: Option<(Row, Bytes)> = None;
    // One that was sent and not answered comes again first, but for what is more urgent: a device that never answers one command must
    // still get the lock or the release that somebody put before everything else.
    let states: &[&str] = if offer.reoffer_sent { &["sent", "queued"] } else { &["queued"] };
    for &state in states {
        loop {
            let expires_after = if found_expired < EXPIRED_ON_THE_WAY { i64::MIN } else { now.as_millis() };
            let only_renewals = i64::from(offer.only_renewals);
            let args = args![id.as_str(), tenant.as_str(), state, now.as_millis(), expires_after, only_renewals];
            let Some(columns) = tx.one(SELECT_NEXT, args).await? else {
                break;
            };
            let row = Row::of(&columns)?;
            if row.expires_at.is_some_and(|at| at <= now) {
                found_expired += 1;
                finish(tx, &row, "expired", &Cause::default(), now).await?;
                continue;
            }
            if chosen.as_ref().is_none_or(|(chosen, _)| row.priority > chosen.priority) {
                let body = tx.keyring.at(&sealed::COMMAND_BODY, &row.tenant, &[&row.uuid]).open(columns.blob(13)?)?;
                chosen = Some((row, body));
            }
            break;
        }
    }
    if let Some((row, body)) = chosen {
        return send(tx, row, body, now).await.map(Next::Command);
    }
    if tx.one(HAS_OPEN, args![id.as_str()]).await?.is_some() {
        return Ok(Next::Later);
    }
    tx.after_commit(Change::Pending(id.clone(), false));
    wakes::not_needed(tx, id, now).await?;
    Ok(Next::Nothing)
}

async fn send(tx: &mut Tx, row: Row, body: Bytes, now: Timestamp) -> Result<NextCommand, StorageError> {
    tx.run(MARK_SENT, args![now.as_millis(), now.as_millis(), row.sequence]).await?;
    if row.renews_identity {
        renewal_begins(tx, &row.enrollment, &row.uuid, now).await?;
    }
    if row.request_type == ERASE {
        erase_begins(tx, &row.enrollment, &row.uuid).await?;
    }
    emit_row(tx, &row, "command.sent", "sent", None, &Cause::default(), now).await?;
    let deliveries = u32::try_from(row.deliveries + 1).unwrap_or(u32::MAX);
    Ok(NextCommand { uuid: row.uuid, request_type: row.request_type, body, deliveries })
}

/// Wipes the device.
const ERASE: &str = "EraseDevice";

/// The status that a malformed report is kept under.
const MALFORMED: &str = "Malformed";
/// The status of a command whose report was never taken, as it was too large again and again. The stored report is empty.
const TOO_LARGE: &str = "TooLarge";

/// Also answers whose queue goes on: a malformed report does not say that it is of a user's channel, but its command does.
async fn report_of(tx: &mut Tx, input: &ReportInput) -> Result<(Recorded, EnrollmentId), StorageError> {
    let ReportInput { tenant, id, command_uuid, .. } = input;
    let found = if input.status.is_some() {
        tx.one(SELECT_QUEUED, args![id.as_str(), command_uuid.as_str(), tenant.as_str()]).await?
    } else {
        let args = args![tenant.as_str(), command_uuid.as_str(), id.as_str(), id.as_str(), id.as_str()];
        let Some(row) = tx.one(SELECT_SENT_TO, args).await? else {
            return Ok((Recorded::Refused, id.clone()));
        };
        Some(row)
    };
    let status = input.status.as_ref().map_or(MALFORMED, Status::as_str);
    let Some(row) = found else {
        if !is_known(tx, tenant, id).await? {
            return Ok((Recorded::Refused, id.clone()));
        }
        return Ok((orphan(tx, input, id, status).await?, id.clone()));
    };
    let row = Row::of(&row)?;
    Ok((report_of_command(tx, input, &row, status).await?, row.enrollment))
}

async fn report_of_command(tx: &mut Tx, input: &ReportInput, row: &Row, status: &str) -> Result<Recorded, StorageError> {
    let now = input.now;
    // Also of one that was given up here.
    if row.request_type == ERASE && matches!(input.status, Some(Status::Error | Status::CommandFormatError)) {
        erase_fails(tx, &row.enrollment, &row.uuid).await?;
    }
    if !row.is_open() {
        if is_repeated(tx, input, row, status).await? {
            return Ok(Recorded::Repeated);
        }
        // It was given up here, by its time or by a person, but the device has carried it out all the same.
        let given_up = matches!(row.state.as_str(), "expired" | "cancelled");
        if given_up && input.status == Some(Status::Acknowledged) && tx.one(IS_OF_THIS_ENROLLMENT, args![row.sequence]).await?.is_some() {
            acknowledged(tx, input, row).await?;
        }
        return orphan(tx, input, &row.enrollment, status).await;
    }
    if matches!(row.state.as_str(), "reviewing" | "held") && row.deliveries == 0 {
        return orphan(tx, input, &row.enrollment, status).await;
    }
    if input.status == Some(Status::NotNow) {
        return not_now(tx, input, row).await;
    }
    let (state, topic) = match &input.status {
        Some(Status::Acknowledged) => ("acknowledged", "command.acknowledged"),
        Some(Status::CommandFormatError) => ("errored", "command.format-error"),
        _ => ("errored", "command.errored"),
    };
    finish_with_result(tx, row, state, status, &input.raw, now).await?;
    // The device answers, whoever queued the command: no plugin effect stands between.
    emit_row(tx, row, topic, status, Some(input), &Cause::default(), now).await?;
    if state == "acknowledged" {
        acknowledged(tx, input, row).await?;
    } else if row.renews_identity {
        renewal_fails(tx, &row.enrollment, &row.uuid).await?;
    }
    Ok(Recorded::Final)
}

async fn finish_with_result(tx: &mut Tx, row: &Row, state: &str, status: &str, report: &Bytes, now: Timestamp) -> Result<(), StorageError> {
    tx.run(
        &FINISH_WITH_RESULT,
        args![
            row.tenant.as_str(),
            row.enrollment.as_str(),
            row.uuid.as_str(),
            status,
            1_i64,
            tx.keyring.at(&sealed::REPORT, &row.tenant, &[&row.enrollment, &row.uuid]).seal(report)?,
            now.as_millis(),
            // The row of the queue.
            state,
            now.as_millis(),
            now.as_millis(),
            row.sequence,
        ],
    )
    .await?;
    Ok(())
}

/// What some commands change in the enrollment itself.
async fn acknowledged(tx: &mut Tx, input: &ReportInput, row: &Row) -> Result<(), StorageError> {
    match row.request_type.as_str() {
        // After the wipe the same device comes back as a new one: it must not find the old one's commands.
        ERASE => {
            let channel = tx.one(SELECT_PARENT, args![row.enrollment.as_str(), input.tenant.as_str()]).await?;
            let parent = channel.map(|channel| channel.opt_text(0)).transpose()?.flatten();
            let device = parent.map_or_else(|| row.enrollment.clone(), EnrollmentId::new);
            renewal_ends(tx, &device).await?;
            clear_queue(tx, &input.tenant, &device, &Cause::default(), input.now).await
        }
        "DeviceConfigured" | "UserConfigured" => configuration_released(tx, &input.tenant, &row.enrollment, input.now).await,
        _ => Ok(()),
    }
}

async fn not_now(tx: &mut Tx, input: &ReportInput, row: &Row) -> Result<Recorded, StorageError> {
    // Each NotNow answers one delivery; one more for the same delivery is the same report again.
    if row.deliveries > 0 && row.not_now_deliveries == row.deliveries {
        return Ok(Recorded::Repeated);
    }
    tx.run(
        UPSERT_RESULT,
        args![
            row.tenant.as_str(),
            row.enrollment.as_str(),
            row.uuid.as_str(),
            Status::NotNow.as_str(),
            0_i64,
            tx.keyring.at(&sealed::REPORT, &row.tenant, &[&row.enrollment, &row.uuid]).seal(&input.raw)?,
            input.now.as_millis(),
        ],
    )
    .await?;
    tx.run(MARK_NOT_NOW, args![input.now.as_millis(), row.sequence]).await?;
    if row.renews_identity {
        // It does not keep the command.
        renewal_fails(tx, &row.enrollment, &row.uuid).await?;
    }
    if row.request_type == ERASE {
        // It goes out again before anything is wiped.
        erase_fails(tx, &row.enrollment, &row.uuid).await?;
    }
    emit_row(tx, row, "command.not-now", Status::NotNow.as_str(), Some(input), &Cause::default(), input.now).await?;
    Ok(Recorded::NotNow)
}

async fn is_repeated(tx: &mut Tx, input: &ReportInput, row: &Row, status: &str) -> Result<bool, StorageError> {
    match tx.one(SELECT_RESULT, args![row.enrollment.as_str(), row.uuid.as_str()]).await? {
        Some(stored) if stored.text(0)? == status => {
            let report = tx.keyring.at(&sealed::REPORT, &row.tenant, &[&row.enrollment, &row.uuid]).open(stored.blob(1)?)?;
            Ok(report == input.raw)
        }
        _ => Ok(false),
    }
}

async fn orphan(tx: &mut Tx, input: &ReportInput, id: &EnrollmentId, status: &str) -> Result<Recorded, StorageError> {
    let ReportInput { tenant, command_uuid, raw, .. } = input;
    let now = input.now.as_millis();
    let length = i64::try_from(raw.len()).unwrap_or(i64::MAX);
    let raw = raw.slice(..raw.len().min(LONGEST_ORPHAN));
    let report = tx.keyring.at(&sealed::ORPHAN_REPORT, tenant, &[id, command_uuid, &now]).seal(&raw)?;
    tx.run(INSERT_ORPHAN, args![tenant.as_str(), id.as_str(), command_uuid.as_str(), status, report, now, length, id.as_str()]).await?;
    tx.run(TRIM_ORPHANS, args![id.as_str(), ORPHANS, ORPHAN_BYTES]).await?;
    Ok(Recorded::Orphan)
}

/// Cancels an open command; `false`: finished or unknown.
pub(crate) async fn cancel(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    uuid: &str,
    cause: &Cause,
    now: Timestamp,
) -> Result<bool, StorageError> {
    let Some(row) = tx.one(SELECT_QUEUED, args![id.as_str(), uuid, tenant.as_str()]).await? else {
        return Ok(false);
    };
    let row = Row::of(&row)?;
    if row.is_open() {
        finish(tx, &row, "cancelled", cause, now).await?;
    }
    Ok(row.is_open())
}

/// Whether [`cancel`] would.
pub(crate) async fn is_cancellable(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, uuid: &str) -> Result<bool, StorageError> {
    match tx.one(SELECT_QUEUED, args![id.as_str(), uuid, tenant.as_str()]).await? {
        Some(row) => Ok(Row::of(&row)?.is_open()),
        None => Ok(false),
    }
}

/// Whether the origin has queued something for the enrollment under that idempotency key.
pub(crate) async fn is_key_used(tx: &mut Tx, tenant: &TenantId, origin: &str, target: &EnrollmentId, key: &str) -> Result<bool, StorageError> {
    Ok(tx.one(SELECT_BY_KEY, args![tenant.as_str(), origin, target.as_str(), key]).await?.is_some())
}

/// Whether the tenant used the UUID for other bytes.
pub(crate) async fn is_reused(tx: &mut Tx, tenant: &TenantId, command: &Command) -> Result<bool, StorageError> {
    match tx.one(SELECT_COMMAND, args![tenant.as_str(), command.uuid.as_str()]).await? {
        Some(row) => Ok(!tx.keyring.is_digest_of(&row.text(0)?, &command.raw)?),
        None => Ok(false),
    }
}

/// Ends a command without a report: `expired` or `cancelled`.
async fn finish(tx: &mut Tx, row: &Row, state: &str, cause: &Cause, now: Timestamp) -> Result<(), StorageError> {
    tx.run(FINISH, args![state, now.as_millis(), now.as_millis(), row.sequence]).await?;
    let topic = if state == "expired" { "command.expired" } else { "command.cancelled" };
    emit_row(tx, row, topic, state, None, cause, now).await
}

/// Cancels all open commands of a device and its users.
pub(crate) async fn clear_queue(tx: &mut Tx, tenant: &TenantId, device: &EnrollmentId, cause: &Cause, now: Timestamp) -> Result<(), StorageError> {
    let rows = tx.all(SELECT_OPEN_OF_DEVICE, args![device.as_str(), device.as_str()]).await?;
    if rows.is_empty() {
        return Ok(());
    }
    wakes::device_begins_anew(tx, device, now).await?;
    tx.run(FINISH_ALL_OF_DEVICE, args![now.as_millis(), now.as_millis(), device.as_str(), device.as_str()]).await?;
    for row in &rows {
        let row = Row::of(row)?;
        tx.after_commit(Change::Pending(row.enrollment.clone(), false));
        if !wanted(tx, tenant, "command.cancelled", Some(&row.request_type), cause).is_empty() {
            emit_row(tx, &row, "command.cancelled", "cancelled", None, cause, now).await?;
        }
    }
    Ok(())
}

/// A device that enrolls anew is another device to everyone who queues commands: the keys of what was queued before it came are free again.
pub(crate) async fn forget_idempotency_keys(tx: &mut Tx, device: &EnrollmentId) -> Result<(), StorageError> {
    tx.run(FORGET_KEYS, args![device.as_str(), device.as_str()]).await?;
    Ok(())
}

/// What an event says of its command.
struct About<'a> {
    uuid: &'a str,
    request_type: &'a str,
    status: &'a str,
    origin: &'a str,
    idempotency_key: Option<&'a str>,
}

async fn emit_row(
    tx: &mut Tx,
    row: &Row,
    topic: &str,
    status: &str,
    report: Option<&ReportInput>,
    cause: &Cause,
    now: Timestamp,
) -> Result<(), StorageError> {
    let about =
        About { uuid: &row.uuid, request_type: &row.request_type, status, origin: &row.origin, idempotency_key: row.idempotency_key.as_deref() };
    emit_command(tx, &row.tenant, &row.enrollment, topic, &about, report, cause, now).await
}

#[expect(clippy::too_many_arguments, reason = "the parts of an event, said once here")]
async fn emit_command(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    topic: &str,
    about: &About<'_>,
    report: Option<&ReportInput>,
    cause: &Cause,
    now: Timestamp,
) -> Result<(), StorageError> {
    let happened = Happened { tenant, topic, request_type: Some(about.request_type), at: now, who: Some(id), cause };
    emit(tx, happened, || json!({ "command": command_data(about, report) })).await
}

fn command_data(about: &About<'_>, report: Option<&ReportInput>) -> Value {
    let mut command = Map::new();
    let mut say = |key: &str, value: Value| {
        command.insert(key.to_owned(), value);
    };
    say("uuid", about.uuid.into());
    say("request_type", about.request_type.into());
    say("status", about.status.into());
    say("origin", about.origin.into());
    // With it a plugin knows its own command again, whose UUID the host has chosen.
    if let Some(key) = about.idempotency_key {
        say("idempotency_key", key.into());
    }
    if let Some(document) = report.and_then(|report| report.document.as_ref()) {
        let document = redacted(document);
        if let Some(chain) = document.get("ErrorChain") {
            say("error_chain", chain.clone());
        }
        say("report", document);
    }
    Value::Object(command)
}
