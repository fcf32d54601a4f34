//! Wakes channels whose time has come: pushes that were promised before a restart, deferred commands, devices that owe a visit, mass pushes,
//! and what plugins ask for.
//!
//! Whoever queues a command pushes at once and by itself; this is the slow hand behind it, off the way of devices, which goes no faster than
//! it is told to: every device that is woken comes and asks. When the next push is due is the storage's rule (`wasmdm_storage::wakes`).

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_storage::wakes::Wake;
use wasmdm_storage::{Storage, StorageError};

use crate::clock::Clock;
use crate::pusher::{Pusher, wake_each};

/// How often the database is looked at; one read by an index.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a second while there is much to do; each takes its share of the pace.
const BEATS: u32 = 10;
/// A page of a push to everyone, as storage stores it.
const PAGE: u32 = 1_000;
/// So many beats' pushes may be under way: a push service that is slow holds each for a while. One that it never answers holds its own place
/// only, not those of the beat.
const UNDER_WAY: u32 = 20;

/// The task that looks and pushes.
pub struct Waker {
    storage: Storage,
    clock: Arc<dyn Clock>,
    pusher: Arc<dyn Pusher>,
    per_second: NonZeroU32,
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waker").field("per_second", &self.per_second).finish_non_exhaustive()
    }
}

impl Waker {
    /// A task over `storage` that wakes by `pusher`, so many channels in a second at most.
    pub fn new(storage: Storage, clock: Arc<dyn Clock>, pusher: Arc<dyn Pusher>, per_second: NonZeroU32) -> Self {
        Self { storage, clock, pusher, per_second }
    }

    /// Until `shutdown`; what has begun ends on `tracker`.
    pub async fn run(self, tracker: TaskTracker, shutdown: CancellationToken) {
        let waker = Arc::new(self);
        let at_once = waker.at_once();
        let under_way =
            Arc::new(Semaphore::new(usize::try_from(at_once.saturating_mul(UNDER_WAY)).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)));
        let changed = waker.storage.wakes_changed();
        loop {
            // Listen before looking, or a commit in between would be missed.
            let announced = changed.notified();
            tokio::pin!(announced);
            announced.as_mut().enable();
            let places = tokio::select! {
                places = Arc::clone(&under_way).acquire_many_owned(at_once) => places,
                () = shutdown.cancelled() => return,
            };
            let Ok(mut places) = places else { return };
            let (taken, is_extended) = match waker.take().await {
                Ok(taken) => taken,
                Err(error) => {
                    warn!("Devices that are to be woken could not be looked for: {error}");
                    (Vec::new(), false)
                }
            };
            if taken.is_empty() && !is_extended {
                drop(places);
                tokio::select! {
                    () = announced => {}
                    () = waker.clock.sleep_until(waker.clock.now().plus(LOOK)) => {}
                    () = shutdown.cancelled() => return,
                }
                continue;
            }
            let pause = waker.pause(taken.len());
            drop(places.split(places.num_permits().saturating_sub(taken.len())));
            let pushing = Arc::clone(&waker);
            tracker.spawn(async move { pushing.wake(taken, |count| drop(places.split(count))).await });
            // The pace is that of the devices that come, whatever the clock says.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Wakes who is due now, as many as in one beat; answers how many.
    pub async fn wake_due(&self) -> Result<usize, StorageError> {
        let (taken, _) = self.take().await?;
        let count = taken.len();
        self.wake(taken, |_| ()).await;
        Ok(count)
    }

    /// Takes who is due, as many as in one beat, and sees to it that there is always somebody to be taken while a push to everyone is not
    /// complete. Whether one was not.
    async fn take(&self) -> Result<(Vec<Wake>, bool), StorageError> {
        let (at_once, now) = (self.at_once(), self.clock.now());
        let mut is_extended = false;
        for _ in 0..at_once.div_ceil(PAGE) {
            if !self.storage.extend_mass_pushes(self.per_second.get(), now).await? {
                break;
            }
            is_extended = true;
        }
        Ok((self.storage.take_due_wakes(at_once, now).await?, is_extended))
    }

    /// Taken in one beat.
    fn at_once(&self) -> u32 {
        self.per_second.get().div_ceil(BEATS)
    }

    /// Until more may be woken after so many.
    fn pause(&self, count: usize) -> Duration {
        let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
        Duration::from_secs(1).saturating_mul(count) / self.per_second.get()
    }

    async fn wake(&self, taken: Vec<Wake>, mut known: impl FnMut(usize) + Send) {
        metrics::counter!("wasmdm_wakes_total").increment(u64::try_from(taken.len()).unwrap_or(u64::MAX));
        let mut by_tenant: BTreeMap<TenantId, Vec<EnrollmentId>> = BTreeMap::new();
        for wake in taken {
            by_tenant.entry(wake.tenant).or_default().push(wake.enrollment);
        }
        for (tenant, ids) in by_tenant {
            let results = wake_each(&self.storage, &*self.clock, &*self.pusher, &tenant, &ids, &mut known).await;
            for (id, result) in ids.iter().zip(&results) {
                if let Err(error) = result {
                    debug!(enrollment.id = %id, "Enrollment {id} could not be woken: {error}");
                }
            }
        }
    }
}
