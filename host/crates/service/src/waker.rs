//! Wakes channels whose time has come: pushes that were promised before a restart, deferred commands, devices that owe a visit.
//!
//! Whoever queues a command pushes at once and by itself; this is the slow hand behind it, off the way of devices. When the next push is due
//! is the storage's rule (`wasmdm_storage::wakes`).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_storage::{Storage, StorageError};

use crate::clock::Clock;
use crate::pusher::Pusher;

/// Taken at once: what one push of many takes a moment for.
const AT_ONCE: u32 = 500;
/// How often the database is looked at; one read by an index.
const LOOK: Duration = Duration::from_secs(1);

/// The task that looks and pushes.
pub struct Waker {
    storage: Storage,
    clock: Arc<dyn Clock>,
    pusher: Arc<dyn Pusher>,
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waker").finish_non_exhaustive()
    }
}

impl Waker {
    /// A task over `storage` that wakes by `pusher`.
    pub fn new(storage: Storage, clock: Arc<dyn Clock>, pusher: Arc<dyn Pusher>) -> Self {
        Self { storage, clock, pusher }
    }

    /// Until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        loop {
            match self.wake_due().await {
                // There may be more.
                Ok(woken) if woken >= usize::try_from(AT_ONCE).unwrap_or(usize::MAX) => continue,
                Ok(_) => {}
                Err(error) => warn!("Devices that are to be woken could not be looked for: {error}"),
            }
            tokio::select! {
                () = self.clock.sleep_until(self.clock.now().plus(LOOK)) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Wakes who is due now; answers how many were taken.
    pub async fn wake_due(&self) -> Result<usize, StorageError> {
        let mut taken: BTreeMap<TenantId, Vec<EnrollmentId>> = BTreeMap::new();
        for wake in self.storage.take_due_wakes(AT_ONCE, self.clock.now()).await? {
            taken.entry(wake.tenant).or_default().push(wake.enrollment);
        }
        let mut count = 0;
        for (tenant, ids) in taken {
            count += ids.len();
            let results = self.pusher.push(&tenant, &ids).await;
            for (id, result) in ids.iter().zip(&results) {
                if let Err(error) = result {
                    debug!(enrollment.id = %id, "Enrollment {id} could not be woken: {error}");
                }
            }
            metrics::counter!("wasmdm_wakes_total").increment(u64::try_from(ids.len()).unwrap_or(u64::MAX));
            self.storage.woken(ids, self.clock.now()).await?;
        }
        Ok(count)
    }
}
