use crate::{Storage, StorageError};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;
/// A cron entry of a plugin's manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CronEntry {
    pub tenant: TenantId,
    pub plugin: String,
    pub name: String,
    pub next_due: Timestamp,
}
impl Storage {
    /// Turns due timers into deliveries of the interface `schedule` (event topic `schedule.tick`, data {name, scheduled_for, data: {"$data"}}).
    /// Answers when the next is due.
    pub async fn fire_timers(&self, _now: Timestamp) -> Result<Option<Timestamp>, StorageError> {
        todo!()
    }
    pub async fn timer(
        &self,
        _tenant: &TenantId,
        _plugin: &str,
        _name: &str,
        _who: Option<&EnrollmentId>,
    ) -> Result<Option<Timestamp>, StorageError> {
        todo!()
    }
    /// Makes the plugin's cron entries these: new ones get `next_due`, known ones keep theirs unless it is later than `next_due`, others go.
    pub async fn set_cron(
        &self,
        _tenant: &TenantId,
        _plugin: &str,
        _entries: Vec<CronEntry>,
    ) -> Result<(), StorageError> {
        todo!()
    }
    pub async fn due_cron(
        &self,
        _now: Timestamp,
    ) -> Result<(Vec<CronEntry>, Option<Timestamp>), StorageError> {
        todo!()
    }
    /// Moves the entry from `entry.next_due` to `next` and adds one delivery, unless one of the same entry still waits (missed ticks coalesce).
    /// Does nothing if another node moved it already.
    pub async fn fire_cron(
        &self,
        _entry: &CronEntry,
        _next: Timestamp,
        _now: Timestamp,
    ) -> Result<(), StorageError> {
        todo!()
    }
}
