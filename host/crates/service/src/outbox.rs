//! The workers that carry events from the database to subscribers.
//!
//! What is leased is a partition (one device of one subscriber), so its events arrive in order and one at a time, while partitions go in
//! parallel. An acknowledgement and the effects of its handler commit together. Retry and dead letters are decided here.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, warn};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::outbox::{Claim, Completed, Completion, Delivery, Lease};
use wasmdm_storage::{Storage, StorageError};

use crate::clock::Clock;
use crate::pusher::{Pusher, wake};
use crate::subscriber::{Delivered, Subscriber};

/// Partitions served at once, of one subscriber, and of one that fails: a destination that answers nothing holds each of its workers until
/// its time is over, and the others' events must not wait for that.
const WORKERS: usize = 64;
const SHARE: u32 = 8;
const SHARE_OF_FAILING: u32 = 2;
/// A worker that does not renew its lease for so long is taken for dead.
const LEASE: Duration = Duration::from_mins(1);
/// Deliveries of one partition before others get a turn.
const TURN: usize = 64;
/// Conflicts in a row that are tried again at once and not counted.
const CONFLICTS: u32 = 5;
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_mins(10);
/// Then an event becomes a dead letter.
const GIVE_UP: Duration = Duration::from_hours(72);
/// A look at the database even if nothing was announced: another node may have written.
const LOOK: Duration = Duration::from_secs(5);

/// So many failures in a row are the subscriber's, not an event's: the first success after them wakes what waits for it.
const OUTAGE: u32 = 3;

/// Pushes of commands that were queued by what was delivered, at once: each of them may wait for the push service for a while. Beyond, the
/// waker makes them: the wish for each stands in the database.
const PUSHING: usize = 32;

/// A number in `0.0..1.0`, for the jitter of retries.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// Delivers what is due, until told to stop.
pub struct Outbox {
    storage: Storage,
    clock: Arc<dyn Clock>,
    pusher: Arc<dyn Pusher>,
    /// By the prefix of the subscriber's name.
    subscribers: Vec<(&'static str, Arc<dyn Subscriber>)>,
    /// Names this process in leases.
    owner: String,
    jitter: Jitter,
    workers: Arc<Semaphore>,
    pushing: Arc<Semaphore>,
    idle_again: Notify,
    /// Failures since the last success of each subscriber that had one.
    failing: Mutex<HashMap<(TenantId, String), u32>>,
    /// Partitions that are being served, of each subscriber.
    serving: Mutex<HashMap<(TenantId, String), u32>>,
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl Outbox {
    /// Workers over `storage`; `owner` must differ between processes.
    pub fn new(
        storage: Storage,
        clock: Arc<dyn Clock>,
        pusher: Arc<dyn Pusher>,
        subscribers: Vec<(&'static str, Arc<dyn Subscriber>)>,
        owner: String,
        jitter: Jitter,
    ) -> Arc<Self> {
        Arc::new(Self {
            storage,
            clock,
            pusher,
            subscribers,
            owner,
            jitter,
            workers: Arc::new(Semaphore::new(WORKERS)),
            pushing: Arc::new(Semaphore::new(PUSHING)),
            idle_again: Notify::new(),
            failing: Mutex::new(HashMap::new()),
            serving: Mutex::new(HashMap::new()),
        })
    }

    /// Runs until `shutdown`; workers that are in the middle of a delivery finish it on `tracker`.
    pub async fn run(self: Arc<Self>, tracker: TaskTracker, shutdown: CancellationToken) {
        let changed = self.storage.outbox_changed();
        while !shutdown.is_cancelled() {
            // Listen before looking, or a commit in between would be missed.
            let announced = changed.notified();
            tokio::pin!(announced);
            announced.as_mut().enable();
            let due = match self.look(&tracker, &shutdown).await {
                Ok(Look::More) => continue,
                Ok(Look::Until(due)) => due,
                Err(error) => {
                    warn!("The outbox could not be read, next try in {LOOK:?}: {error}");
                    None
                }
            };
            let latest = self.clock.now().plus(LOOK);
            let until = due.map_or(latest, |due| due.min(latest));
            tokio::select! {
                () = announced => {}
                () = self.idle_again.notified() => {}
                () = self.clock.sleep_until(until) => {}
                // On a clock that is moved by hand, or set back, the look at other nodes' writes still happens.
                () = tokio::time::sleep(LOOK) => {}
                () = shutdown.cancelled() => {}
            }
        }
    }

    /// Starts workers for what is due.
    async fn look(self: &Arc<Self>, tracker: &TaskTracker, shutdown: &CancellationToken) -> Result<Look, StorageError> {
        let now = self.clock.now();
        let timer = self.storage.fire_timers(now).await?;
        let free = self.workers.available_permits();
        if free == 0 {
            return Ok(Look::Until(None));
        }
        let limit = u32::try_from(free).unwrap_or(u32::MAX);
        let claim = Claim { owner: self.owner.clone(), limit, share: SHARE, shares: self.shares(), lease: LEASE, now };
        let leases = self.storage.claim(claim).await?;
        if leases.is_empty() {
            // Nothing is due now, so whatever is known to be due lies ahead (or is leased by a worker, which announces its end).
            let partition = self.storage.outbox_due_after(now).await?;
            return Ok(Look::Until([timer, partition].into_iter().flatten().min()));
        }
        for lease in leases {
            let Ok(permit) = Arc::clone(&self.workers).try_acquire_owned() else {
                self.storage.release(&lease, now).await?;
                continue;
            };
            let outbox = Arc::clone(self);
            let (shutdown, pushes) = (shutdown.clone(), tracker.clone());
            *outbox.serving.lock().entry(subscriber_of(&lease)).or_default() += 1;
            tracker.spawn(async move {
                let served = outbox.serve(&lease, &pushes, &shutdown).await;
                if let Err(error) = &served {
                    warn!(subscriber = lease.subscriber, partition = lease.partition, "A partition of the outbox was left: {error}");
                }
                if !matches!(served, Ok(Served::Released))
                    && let Err(error) = outbox.storage.release(&lease, outbox.clock.now()).await
                {
                    debug!(subscriber = lease.subscriber, "The lease runs out by itself: {error}");
                }
                outbox.leave(&lease);
                drop(permit);
                outbox.idle_again.notify_one();
            });
        }
        Ok(Look::More)
    }

    /// How many more partitions the subscribers may have that are served already or fail.
    fn shares(&self) -> HashMap<(TenantId, String), u32> {
        let mut shares: HashMap<_, _> = self
            .failing
            .lock()
            .iter()
            .filter(|(_, failures)| **failures >= OUTAGE)
            .map(|(subscriber, _)| (subscriber.clone(), SHARE_OF_FAILING))
            .collect();
        for (subscriber, serving) in &*self.serving.lock() {
            let share = shares.entry(subscriber.clone()).or_insert(SHARE);
            *share = share.saturating_sub(*serving);
        }
        shares
    }

    /// A partition is no longer served.
    fn leave(&self, lease: &Lease) {
        let mut serving = self.serving.lock();
        if let Entry::Occupied(mut entry) = serving.entry(subscriber_of(lease)) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    /// Delivers a partition's events one after the other.
    async fn serve(self: &Arc<Self>, lease: &Lease, tracker: &TaskTracker, shutdown: &CancellationToken) -> Result<Served, StorageError> {
        for _ in 0..TURN {
            if shutdown.is_cancelled() {
                return Ok(Served::Held);
            }
            let Some(delivery) = self.storage.next_delivery(lease, self.clock.now()).await? else {
                return Ok(Served::Held);
            };
            if let Some(served) = self.deliver(lease, &delivery, tracker).await? {
                return Ok(served);
            }
        }
        Ok(Served::Held)
    }

    /// One attempt at one event; `None`: the partition may go on.
    async fn deliver(self: &Arc<Self>, lease: &Lease, delivery: &Delivery, tracker: &TaskTracker) -> Result<Option<Served>, StorageError> {
        let delivered = match self.subscribers.iter().find(|(prefix, _)| lease.subscriber.starts_with(prefix)) {
            Some((_, subscriber)) => self.while_renewing(lease, subscriber.deliver(lease, delivery)).await,
            None => Some(Delivered::Postponed { reason: "this server has no such kind of subscriber".to_owned(), retry_after: LONGEST_RETRY }),
        };
        let Some(delivered) = delivered else {
            warn!(subscriber = lease.subscriber, partition = lease.partition, "A lease was lost during a delivery; its effects are discarded");
            return Ok(Some(Served::Held));
        };
        let now = self.clock.now();
        let (completion, outcome, to_wake) = match delivered {
            Delivered::Done { effects, by } => {
                // Whose command must not go out yet comes for nothing; it is woken when its time has come.
                let to_wake: BTreeSet<EnrollmentId> = effects
                    .iter()
                    .flat_map(|effects| effects.commands.iter())
                    .filter(|command| command.options.push && command.options.not_before.is_none_or(|at| at <= now))
                    .map(|command| command.target.clone())
                    .collect();
                (Completion::Done { effects, by }, "done", to_wake)
            }
            Delivered::Failed { error, retryable, retry_after, by } => {
                let overdue = delivery.first_failed_at.is_some_and(|first| now.since(first) >= GIVE_UP);
                if retryable && !overdue {
                    // A plugin that asks for no wait at all would keep a worker and the disk busy.
                    let wait = retry_after.map_or_else(|| self.backoff(delivery.attempt), |wait| wait.max(FIRST_RETRY)).min(LONGEST_RETRY);
                    let mut failing = self.failing.lock();
                    let failures = failing.entry(subscriber_of(lease)).or_default();
                    *failures = failures.saturating_add(1);
                    drop(failing);
                    (Completion::Retry { at: now.plus(wait), error, counted: true, by }, "retry", BTreeSet::new())
                } else {
                    (Completion::Dead { error, by }, "dead", BTreeSet::new())
                }
            }
            Delivered::Postponed { reason, retry_after } => {
                let by = serde_json::json!({ "reason": reason });
                (Completion::Retry { at: now.plus(retry_after), error: reason, counted: false, by }, "postponed", BTreeSet::new())
            }
        };
        metrics::counter!("wasmdm_outbox_deliveries_total", "interface" => lease.interface.clone(), "outcome" => outcome).increment(1);
        if let Completion::Dead { error, .. } = &completion {
            error!(
                subscriber = lease.subscriber,
                event.id = delivery.event.id,
                event.topic = delivery.event.topic,
                "An event became a dead letter: {error}"
            );
        }
        let succeeded = matches!(completion, Completion::Done { .. });
        match self.storage.complete(lease, delivery, completion, now).await? {
            Completed::Stored { released } => {
                // One event that fails among others that do not is not helped by trying it again at once.
                if succeeded && self.failing.lock().remove(&subscriber_of(lease)).is_some_and(|failures| failures >= OUTAGE) {
                    self.storage.wake_subscriber(&lease.tenant, &lease.subscriber, now).await?;
                }
                if !to_wake.is_empty() {
                    self.wake_beside(tracker, lease.tenant.clone(), to_wake.into_iter().collect());
                }
                Ok(released.then_some(Served::Released))
            }
            Completed::Conflict(what) if delivery.conflicts < CONFLICTS => {
                debug!(
                    subscriber = lease.subscriber,
                    event.id = delivery.event.id,
                    "A delivery is made again, because something that it read changed: {what}"
                );
                Ok(None)
            }
            Completed::Conflict(what) => {
                let error = format!("what it read changed {CONFLICTS} times: {what}");
                let retry = Completion::Retry { at: now.plus(self.backoff(delivery.attempt)), error, counted: true, by: serde_json::Value::Null };
                self.ended(lease, delivery, retry, now).await
            }
            Completed::Rejected(why) => {
                error!(
                    subscriber = lease.subscriber,
                    event.id = delivery.event.id,
                    "An event became a dead letter, because its effects cannot be stored: {why}"
                );
                let dead = Completion::Dead { error: format!("its effects cannot be stored: {why}"), by: serde_json::Value::Null };
                self.ended(lease, delivery, dead, now).await
            }
            Completed::LeaseLost => Ok(Some(Served::Held)),
        }
    }

    /// Wakes whom commands were queued for, and lets nobody wait for it: a push service that does not answer would hold every worker, and
    /// with them the events of all subscribers.
    fn wake_beside(self: &Arc<Self>, tracker: &TaskTracker, tenant: TenantId, ids: Vec<EnrollmentId>) {
        let Ok(permit) = Arc::clone(&self.pushing).try_acquire_owned() else { return };
        let outbox = Arc::clone(self);
        tracker.spawn(async move {
            wake(&outbox.storage, &*outbox.clock, &*outbox.pusher, &tenant, &ids).await;
            drop(permit);
        });
    }

    /// Ends a delivery without effects.
    async fn ended(&self, lease: &Lease, delivery: &Delivery, completion: Completion, now: Timestamp) -> Result<Option<Served>, StorageError> {
        let completed = self.storage.complete(lease, delivery, completion, now).await?;
        Ok(matches!(completed, Completed::Stored { released: true }).then_some(Served::Released))
    }

    /// Awaits `work` and prolongs the lease meanwhile; `None` if it was lost.
    async fn while_renewing<T>(&self, lease: &Lease, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                () = tokio::time::sleep(LEASE / 3) => match self.storage.renew(lease, LEASE, self.clock.now()).await {
                    Ok(true) => {}
                    Ok(false) => return None,
                    // The fence at the commit decides.
                    Err(error) => debug!(subscriber = lease.subscriber, "A lease could not be renewed: {error}"),
                },
            }
        }
    }

    /// Doubles from 1 s to 10 min, of which at least half is waited.
    fn backoff(&self, attempt: u32) -> Duration {
        let longest = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1).min(16))).min(LONGEST_RETRY);
        longest.mul_f64(0.5 + (self.jitter)().clamp(0.0, 1.0) / 2.0)
    }
}

fn subscriber_of(lease: &Lease) -> (TenantId, String) {
    (lease.tenant.clone(), lease.subscriber.clone())
}

/// How a turn of a partition ended.
enum Served {
    /// Its lease is to be given back.
    Held,
    /// It was, with the last delivery.
    Released,
}

enum Look {
    /// There was something: look again at once.
    More,
    /// Nothing until then, as far as is known.
    Until(Option<Timestamp>),
}
