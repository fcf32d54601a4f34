use crate::{Storage, StorageError};
use bytes::Bytes;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::report::Status;
use wasmdm_protocol::time::Timestamp;

#[derive(Debug, Clone, Default)]
pub struct CommandOptions {
    pub idempotency_key: Option<String>,
    pub collapse_key: Option<String>,
    pub priority: i8,
    pub not_before: Option<Timestamp>,
    pub expires_at: Option<Timestamp>,
    pub push: bool,
}

#[derive(Debug, Clone)]
pub struct Enqueue {
    pub tenant: TenantId,
    pub targets: Vec<EnrollmentId>,
    pub command: Command,
    pub options: CommandOptions,
    /// `api:SUBJECT` or `plugin:NAME`.
    pub origin: String,
    pub now: Timestamp,
}

/// One per target, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnqueueOutcome {
    Queued {
        uuid: String,
    },
    /// The same command again (same UUID and bytes, or same idempotency key): nothing changed. `uuid` is that of the first.
    AlreadyQueued {
        uuid: String,
    },
    UnknownEnrollment,
    /// The UUID was used by this tenant with other bytes.
    UuidReused,
}

/// A command on its way to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextCommand {
    pub uuid: String,
    pub request_type: String,
    pub body: Bytes,
    /// 1 at the first delivery.
    pub deliveries: u32,
}

/// A report that belongs to the enrollment.
#[derive(Debug, Clone)]
pub struct ReportInput {
    pub tenant: TenantId,
    pub id: EnrollmentId,
    /// Never `Idle`. `None`: malformed, stored as `errored(parse)`.
    pub status: Option<Status>,
    pub command_uuid: String,
    pub raw: Bytes,
    pub document: Option<wasmdm_protocol::plist::Value>,
    pub now: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded {
    Final,
    NotNow,
    /// The same final report again.
    Repeated,
    /// Of no command that is open: kept apart.
    Orphan,
    /// Only for a malformed report: its UUID was never sent to this enrollment or its users; nothing was written.
    Refused,
}

#[derive(Debug, Clone)]
pub struct CommandStatus {
    pub uuid: String,
    pub request_type: String,
    /// queued, sent, not-now, acknowledged, errored, expired, cancelled (final schema has more).
    pub state: String,
    pub origin: String,
    pub deliveries: u32,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// Raw, if any report was stored.
    pub report: Option<Bytes>,
}

impl Storage {
    pub async fn enqueue(&self, _enqueue: Enqueue) -> Result<Vec<EnqueueOutcome>, StorageError> {
        todo!()
    }
    /// An Idle poll: clears NotNow marks (if there are any), then offers the next command. With `reoffer_sent` one that was sent and not
    /// answered comes again first. Nothing pending: no database work at all on SQLite.
    pub async fn poll(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
        _reoffer_sent: bool,
        _now: Timestamp,
    ) -> Result<Option<NextCommand>, StorageError> {
        todo!()
    }
    /// Stores a report and takes the next command, in one transaction. After a report no command that stands at NotNow or was sent is offered.
    pub async fn report(
        &self,
        _report: ReportInput,
        _want_next: bool,
    ) -> Result<(Recorded, Option<NextCommand>), StorageError> {
        todo!()
    }
    pub async fn pending_commands(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
    ) -> Result<Vec<CommandStatus>, StorageError> {
        todo!()
    }
    pub async fn command_status(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
        _uuid: &str,
    ) -> Result<Option<CommandStatus>, StorageError> {
        todo!()
    }
    /// `false`: finished or unknown.
    pub async fn cancel_command(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
        _uuid: &str,
        _now: Timestamp,
    ) -> Result<bool, StorageError> {
        todo!()
    }
    /// Expires what is due; called every few seconds.
    pub async fn expire_commands(&self, _now: Timestamp) -> Result<u64, StorageError> {
        todo!()
    }
}
