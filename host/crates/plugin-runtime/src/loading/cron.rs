//! Cron schedules of active plugins, in UTC.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use croner::Cron;
use parking_lot::RwLock;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock;
use wasmdm_storage::Storage;
use wasmdm_storage::timers::CronEntry;

/// A look at least this often: another node may have moved an entry.
const LOOK: Duration = Duration::from_mins(1);
/// After a failure, and for entries whose plugin is not there.
const PAUSE: Duration = Duration::from_secs(5);

/// The expressions of all active plugins, by plugin and name.
#[derive(Debug, Clone, Default)]
pub struct Schedules {
    by_plugin: Arc<RwLock<BTreeMap<String, BTreeMap<String, Cron>>>>,
    changed: Arc<Notify>,
}

impl Schedules {
    /// Makes these the plugin's schedules.
    pub(super) fn set(&self, plugin: &str, schedules: BTreeMap<String, Cron>) {
        let mut by_plugin = self.by_plugin.write();
        if schedules.is_empty() {
            by_plugin.remove(plugin);
        } else {
            by_plugin.insert(plugin.to_owned(), schedules);
        }
        drop(by_plugin);
        self.changed.notify_one();
    }

    /// When the schedule is due next, after `now`; `None`: there is no such schedule, or it is never due again.
    fn next(&self, plugin: &str, name: &str, now: Timestamp) -> Option<Timestamp> {
        next_occurrence(self.by_plugin.read().get(plugin)?.get(name)?, now)
    }
}

/// The first occurrence after `now`; `None`: never again.
pub(super) fn next_occurrence(cron: &Cron, now: Timestamp) -> Option<Timestamp> {
    // Cron knows seconds; a fraction would come back in the answer.
    let now: DateTime<Utc> = DateTime::from_timestamp(now.as_millis().div_euclid(1000), 0)?;
    let next = cron.find_next_occurrence(&now, false).ok()?;
    Some(Timestamp::from_millis(next.timestamp_millis()))
}

/// Turns due cron entries into deliveries until shutdown. Of ticks that were missed one is made up for.
pub async fn run_cron(storage: Storage, clock: Arc<dyn Clock>, schedules: Schedules, shutdown: CancellationToken) {
    loop {
        let wait = match fire_due(&storage, clock.now(), &schedules).await {
            Ok(next) => next,
            Err(error) => {
                warn!("Cron schedules of plugins could not be looked for: {error}");
                Some(clock.now().plus(PAUSE))
            }
        };
        let until = wait.unwrap_or_else(|| clock.now().plus(LOOK)).min(clock.now().plus(LOOK));
        tokio::select! {
            () = clock.sleep_until(until) => {}
            () = schedules.changed.notified() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Fires what is due, and answers when to look again.
async fn fire_due(storage: &Storage, now: Timestamp, schedules: &Schedules) -> Result<Option<Timestamp>, wasmdm_storage::StorageError> {
    let (due, next) = storage.due_cron(now).await?;
    let mut absent = false;
    for entry in due {
        match schedules.next(&entry.plugin, &entry.name, now) {
            Some(next) => storage.fire_cron(&entry, next, now).await?,
            // Its plugin is about to be loaded, or about to take its entries along.
            None => absent = true,
        }
    }
    // What was fired has a new time, which `next` does not know.
    let after = storage.due_cron(now).await?.1.or(next);
    let pause = absent.then(|| now.plus(PAUSE));
    Ok(match (after, pause) {
        (Some(after), Some(pause)) => Some(after.max(pause)),
        (after, pause) => after.or(pause),
    })
}

/// The entries to store for a plugin and a tenant.
pub(super) fn entries(
    tenant: &wasmdm_protocol::enrollment::TenantId,
    plugin: &str,
    schedules: &BTreeMap<String, Cron>,
    now: Timestamp,
) -> Vec<CronEntry> {
    let entry = |(name, cron): (&String, &Cron)| {
        Some(CronEntry { tenant: tenant.clone(), plugin: plugin.to_owned(), name: name.clone(), next_due: next_occurrence(cron, now)? })
    };
    schedules.iter().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::str::FromStr as _;

    #[test]
    fn the_next_occurrence_is_after_now_in_utc() {
        let cron = Cron::from_str("*/15 * * * *").unwrap();
        let at = |millis| Timestamp::from_millis(millis);
        let quarter = 15 * 60 * 1000;
        assert_eq!(next_occurrence(&cron, at(0)), Some(at(quarter)));
        assert_eq!(next_occurrence(&cron, at(quarter - 1)), Some(at(quarter)));
        assert_eq!(next_occurrence(&cron, at(quarter)), Some(at(2 * quarter)));
        let daily = Cron::from_str("30 2 * * *").unwrap();
        assert_eq!(next_occurrence(&daily, at(0)), Some(at((2 * 60 + 30) * 60 * 1000)));
    }
}
